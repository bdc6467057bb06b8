"""Split models: stem | blocks with bridges between them | head, and what each part costs.

The device runs ``stem``, ``bridges`` and ``head``; the cloud runs ``blocks``. In eval mode the
device's parts treat every member of a group on its own (fixed statistics only), and a block of a
linear model is exactly linear: no bias, no activation, norms that only scale. Mixtures then de-mix
to what the unmixed features would have given, for every matrix of coefficients.

    stem -> blocks[0] -> bridges[0] -> blocks[1] -> ... -> blocks[-1] -> head
"""

from datamix.models.build import build, register
from datamix.models.costs import Costs, costs
from datamix.models.flops import Flops, block_shapes, count_flops
from datamix.models.layers import ScaleNorm, Whiten
from datamix.models.options import Options
from datamix.models.sequential import split_model
from datamix.models.split import Architecture, SplitModel
from datamix.models.trace import is_linear

__all__ = [
    "Architecture",
    "Costs",
    "Flops",
    "Options",
    "ScaleNorm",
    "SplitModel",
    "Whiten",
    "block_shapes",
    "build",
    "costs",
    "count_flops",
    "is_linear",
    "register",
    "split_model",
]

"""Split models: stem | blocks with bridges between them | head, and what each part costs.

The device runs ``stem``, ``bridges`` and ``head``; the cloud runs ``blocks``. In eval mode the
device's parts treat every member of a group on its own (fixed statistics only), and a block of a
linear model is exactly linear: no bias, no activation, norms that only scale. Mixtures then de-mix
to what the unmixed features would have given, for every matrix of coefficients.

    stem -> blocks[0] -> bridges[0] -> blocks[1] -> ... -> blocks[-1] -> head
"""

from datamix.models.build import build
from datamix.models.costs import Flops, block_shapes, count_flops
from datamix.models.layers import ScaleNorm, Whiten
from datamix.models.split import Architecture, SplitModel

__all__ = [
    "Architecture",
    "Flops",
    "ScaleNorm",
    "SplitModel",
    "Whiten",
    "block_shapes",
    "build",
    "count_flops",
]

"""Methods side by side: what the cloud's part is, and what a network learns from.

linear      linear blocks, trained unmixed: mixing them is exact
datamix     the paper's: a non-linear cloud, loss on head(A^-1 block(A stem(x))), fresh A always
nonlinear   the same with PReLU and norms without offset, and a teacher that is never mixed
bounded     linear blocks, with noise on the mixtures that nobody takes away again
unmixed     a non-linear cloud that sees the features as they are: the baseline above
edge-only   stem and a head of its own, no cloud: the baseline below
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Method:
    """How a network is built, trained and used.

    Attributes:
        cloud: the architecture's option ``cloud`` where it is not given.
        linear: whether the blocks must be linear, must not be, or may be either (None).
        offloads: whether there is a cloud at all.
        mixes: trained on mixtures.
        mixed: used on mixtures.
        noisy: mixtures carry noise, in training and in use.
        distils: has a teacher unless told otherwise.
    """

    cloud: Literal["linear", "relu", "prelu"] = "relu"
    linear: bool | None = False
    offloads: bool = True
    mixes: bool = True
    mixed: bool = True
    noisy: bool = False
    distils: bool = False


METHODS: Mapping[str, Method] = {
    # Linear blocks commute with mixing, so the mixed loss *is* the unmixed one: mixing in
    # training would cost time and teach nothing.
    "linear": Method(cloud="linear", linear=True, mixes=False),
    "datamix": Method(),
    "nonlinear": Method(cloud="prelu", distils=True),
    "bounded": Method(cloud="linear", linear=True, noisy=True),
    "unmixed": Method(linear=None, mixes=False, mixed=False),
    "edge-only": Method(linear=None, offloads=False, mixes=False, mixed=False),
}

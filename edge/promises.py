"""What each mode promises for a bundle, in bits, and how it is known to break: one place for all.

The client, the audit and the ledger's charges come from here (docs/privacy.md has the whole story).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.modes import check_mode, gaussian_bits

if TYPE_CHECKING:
    from datamix.bundle import Manifest, Mode

_BREAKS: dict[str, str] = {
    "mix": (
        "source separation on the mixtures of one group recovers the inputs, and a gallery item is"
        " recognised without separating anything"
    ),
    "bounded": (
        "at sigma of practical use the bound is hundreds of bits for each input, and a gallery item"
        " is still recognised; repeats of an input add up"
    ),
    "split": "the two operators together subtract the noise and see every input",
}


@dataclass(frozen=True, slots=True)
class Promise:
    """What a mode promises.

    Attributes:
        mode: which.
        bits_per_input: most information that the operator who gets the features learns of one
            input, all rounds together; infinite where there is no bound.
        known_break: what is known to get around it.
    """

    mode: Mode
    bits_per_input: float
    known_break: str

    @property
    def text(self) -> str:
        """The promise in a line."""
        if self.mode == "mix":
            return "mix: obfuscation, no bound"
        bound = f"at most {self.bits_per_input:.3g} bits per input, all rounds together"
        if self.mode == "split":
            return f"split: operator A learns {bound}; operator B nothing, if they do not collude"
        return f"bounded: the cloud learns {bound}"

    def sentence(self, not_private: str | None = None) -> str:
        """The mode, its promise and its known break; first why nothing holds, where it does not."""
        return sentence(self.text, self.known_break, not_private)


def sentence(text: str, known_break: str, not_private: str | None = None) -> str:
    """A promise as it is to be shown wherever results are.

    Args:
        text: :attr:`Promise.text`.
        known_break: of the mode.
        not_private: why the two ends seem to have one operator; None where nothing says so.
    """
    said = f"{text}; known break: {known_break}"
    return said if not_private is None else f"NOT PRIVATE: {not_private}. {said}"


def bits_per_input(shapes: Iterable[tuple[int, ...]], sigma: float) -> float:
    """Most that can be learnt of one input from clipped features under noise, all rounds together.

    Args:
        shapes: of what leaves in each round, (C, H, W).
        sigma: deviation of the noise.

    Raises:
        ConfigError: ``sigma`` is not positive and finite.
    """
    return gaussian_bits(sum(map(math.prod, shapes)), sigma)


def promise(manifest: Manifest, mode: str | None = None) -> Promise:
    """What ``mode`` promises for this bundle; the bundle's own mode by default.

    Raises:
        ConfigError: the bundle was not made for that mode.
    """
    chosen = check_mode(manifest, mode)
    spec = {"split": manifest.split, "bounded": manifest.bounded}.get(chosen)
    bits = math.inf
    if spec is not None:
        bits = bits_per_input((block.input_shape for block in manifest.blocks), spec.sigma)
    return Promise(chosen, bits, _BREAKS[chosen])

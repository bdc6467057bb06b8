"""From raw inputs to what the stem takes, as a manifest says it; :mod:`edge.preprocess` does it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, model_validator

from datamix.schema import MAX_VALUES, Shape, Strict


class ImagePreprocessing(Strict):
    """From raw uint8 pixels: ``(pixel / 255 - mean) / std`` per channel.

    ``input_shape`` is (C, H, W), raw inputs have the same; ``mean`` and ``std`` have C values each.
    """

    kind: Literal["image"]
    input_shape: Shape
    mean: Annotated[tuple[FiniteFloat, ...], Field(max_length=1024)]
    std: Annotated[tuple[Annotated[FiniteFloat, Field(gt=0)], ...], Field(max_length=1024)]

    @model_validator(mode="after")
    def _fits(self) -> ImagePreprocessing:
        channels = self.input_shape[0]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(f"mean and std need {channels} values each, one per channel")
        return self

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Of one raw input."""
        return self.input_shape


class LogMelPreprocessing(Strict):
    """From raw int16 samples: ``(log(mel power + offset) - mean) / std``; see docs/data.md.

    Attributes:
        kind: tells it from the other preprocessings.
        sample_rate: of the raw audio, per second.
        samples: how many make one raw input.
        n_fft: samples per frame, all of them under the window.
        hop: samples from one frame to the next; frames lie wholly within the input.
        n_mels: triangular filters.
        low_hz: where the first filter begins.
        high_hz: where the last filter ends, at most half the sample rate.
        offset: added to the power before the logarithm, so that silence has one.
        input_shape: (1, n_mels, frames), what the stem takes.
        mean: one value.
        std: one value.
    """

    kind: Literal["log-mel"]
    sample_rate: Annotated[int, Field(ge=1, le=384_000)]
    samples: Annotated[int, Field(ge=1, le=1 << 22)]
    n_fft: Annotated[int, Field(ge=2, le=1 << 14)]
    hop: Annotated[int, Field(ge=1, le=1 << 14)]
    n_mels: Annotated[int, Field(ge=1, le=512)]
    low_hz: Annotated[FiniteFloat, Field(ge=0)]
    high_hz: Annotated[FiniteFloat, Field(gt=0)]
    offset: Annotated[FiniteFloat, Field(gt=0)]
    input_shape: Shape
    mean: tuple[FiniteFloat]
    std: tuple[Annotated[FiniteFloat, Field(gt=0)]]

    @model_validator(mode="after")
    def _fits(self) -> LogMelPreprocessing:
        if not self.low_hz < self.high_hz <= self.sample_rate / 2:
            raise ValueError("low_hz, high_hz and half the sample_rate need to ascend")
        if self.n_fft > self.samples:
            raise ValueError(f"a frame of {self.n_fft} is longer than {self.samples} samples")
        expected = (1, self.n_mels, 1 + (self.samples - self.n_fft) // self.hop)
        if self.input_shape != expected:
            raise ValueError(f"input_shape needs to be {expected}, as the other fields say")
        if expected[2] * self.n_fft > MAX_VALUES:
            raise ValueError(f"the frames of one input have more than {MAX_VALUES} values")
        return self

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Of one raw input."""
        return (self.samples,)


Preprocessing = Annotated[
    ImagePreprocessing | LogMelPreprocessing,
    Field(discriminator="kind"),
]
"""From raw inputs to what the stem takes."""

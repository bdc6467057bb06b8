"""Log-mel features in torch, for training: the numbers of :mod:`edge.preprocess`, on any device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from datamix.errors import ConfigError
from datamix.preprocessing import LogMelPreprocessing
from edge.preprocess import FULL_SCALE, frame_window, mel_filters


class LogMel(nn.Module):
    """(n, samples) int16, or float32 in -1..1, to (n, 1, n_mels, frames) float32.

    Computed in float32 under autocast, too: powers span ten decades, which float16 does not.

    Values that a device would refuse are not looked for: training data is one's own, and a look
    at them would stop a GPU.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, preprocessing: LogMelPreprocessing) -> None:
        """Compute window and filters.

        Raises:
            ConfigError: see :func:`edge.preprocess.mel_filters`.
        """
        super().__init__()
        self.preprocessing = preprocessing
        window = torch.from_numpy(frame_window(preprocessing.n_fft))
        filters = torch.from_numpy(mel_filters(preprocessing).T.copy())
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, waves: Tensor) -> Tensor:
        """Frames, spectrum, filters, logarithm.

        Raises:
            ConfigError: another shape or type.
        """
        spec = self.preprocessing
        if waves.shape[1:] != spec.raw_shape:
            raise ConfigError(
                f"inputs have shape {tuple(waves.shape)}, expected {('n', *spec.raw_shape)}"
            )
        if waves.dtype == torch.int16:
            waves = waves.float() / FULL_SCALE
        elif waves.dtype != torch.float32:
            raise ConfigError(f"inputs have dtype {waves.dtype}, expected int16 or float32")
        spectrum = torch.fft.rfft(waves.unfold(1, spec.n_fft, spec.hop) * self.window)
        power = spectrum.real.square() + spectrum.imag.square()
        with torch.autocast(waves.device.type, enabled=False):
            levels = torch.log(power @ self.filters + spec.offset)
        return ((levels - spec.mean[0]) / spec.std[0]).transpose(1, 2).unsqueeze(1)

"""The samples that ship with the package; edge/samples/README.md says where they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datamix.errors import ConfigError
from datamix.preprocessing import ImagePreprocessing, Preprocessing
from edge.data import fashion_mnist, speech_commands
from edge.data.dataset import Dataset

SAMPLES = Path(__file__).parents[1] / "samples"


def sample_for(preprocessing: Preprocessing) -> Dataset:
    """The shipped sample of the kind of input that a bundle takes: images or speech."""
    if isinstance(preprocessing, ImagePreprocessing):
        return load_sample(fashion_mnist.NAME)
    return load_sample(speech_commands.NAME)


def load_sample(name: str = fashion_mnist.NAME) -> Dataset:
    """A part of a test split, in memory.

    ``fashion-mnist``: the first 1,000 test images (MIT licence). ``speech-commands``: 16 clips of
    each class from the test split by speaker (CC BY 4.0, Pete Warden, Google).

    Raises:
        ConfigError: no sample of that name.
    """
    if name == fashion_mnist.NAME:
        with np.load(SAMPLES / "fashion-mnist-1000.npz", allow_pickle=False) as arrays:
            return fashion_mnist.fashion_mnist(arrays["images"], arrays["labels"])
    if name == speech_commands.NAME:
        with np.load(SAMPLES / "speech-commands-176.npz", allow_pickle=False) as arrays:
            return speech_commands.speech_commands(
                arrays["pcm"], arrays["labels"], speaker=arrays["speaker"], word=arrays["word"]
            )
    raise ConfigError(
        f"sample is {name!r}, expected {fashion_mnist.NAME!r} or {speech_commands.NAME!r}"
    )

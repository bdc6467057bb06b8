"""Data sets from files that the user has, and two small samples that ship with the package.

    load_dataset("cifar10", "train", "/data")     the published layouts, see docs/data.md
    load_sample("speech-commands")                no files needed

Nothing is downloaded here, and nothing is unpickled as Python would.
"""

from edge.data.catalog import NAMES, load_dataset
from edge.data.dataset import Dataset, Inputs, Split
from edge.data.fashion_mnist import FASHION_MNIST_CLASSES, FASHION_MNIST_PREPROCESSING
from edge.data.folder import VARIABLE
from edge.data.sample import load_sample, sample_for

__all__ = [
    "FASHION_MNIST_CLASSES",
    "FASHION_MNIST_PREPROCESSING",
    "NAMES",
    "VARIABLE",
    "Dataset",
    "Inputs",
    "Split",
    "load_dataset",
    "load_sample",
    "sample_for",
]

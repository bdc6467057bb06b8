"""What one operator sees, and nothing else: messages as they crossed the wire, and what is public.

An attack imports this module, :mod:`edge.audit.attack`, `datamix` and the public parts of `edge`;
never what holds a secret (tests/test_audit_guard.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from datamix import wire
from datamix.bundle import ImagePreprocessing, Preprocessing
from edge.preprocess import preprocessor

if TYPE_CHECKING:
    from datamix.bundle import Manifest
    from datamix.models import SplitModel
    from edge.data import Dataset

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Operator = Literal["A", "B"]
Direction = Literal["up", "down"]

LOG_MEL_RANGE = 3.0
"""Deviations of a log-mel feature that the picture of a clip shows, each way."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message, as the operator got or sent it.

    Attributes:
        operator: whose message; "A" is the one that gets features, in every mode.
        direction: "up" from the device, "down" to it.
        at_s: when it was sent or came back, in seconds since the capture began.
        body: the exact bytes, docs/wire.md.
    """

    operator: Operator
    direction: Direction
    at_s: float
    body: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Public:
    """What everybody knows.

    Attributes:
        manifest: of the bundle; its ``group_size`` is the K of this capture.
        model: stem, blocks, bridges, head with their weights; eval mode, float32.
        training: labelled data like the victims', disjoint from them.
        gallery: (g, *raw_shape) raw inputs, 200 where the data suffice; each victim is one of them.
        gallery_labels: (g,) int64 classes of the gallery.
    """

    manifest: Manifest
    model: SplitModel
    training: Dataset
    gallery: Array
    gallery_labels: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One operator's view of a capture.

    Attributes:
        mode: "mix", "bounded" or "split".
        operator: "A" or "B"; modes with one operator have "A" only.
        messages: that operator's, in the order of time.
        public: what everybody knows.
    """

    mode: str
    operator: Operator
    messages: tuple[Message, ...]
    public: Public


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One inference of one group, as an operator pieces it together.

    Attributes:
        request_ids: one for each block.
        rounds: what the device sent for each block, (K, C, H, W) float32, scales applied.
        answers: what it was answered, (K, C', H', W') float32.
        at_s: when each round was sent, in seconds since the capture began.
    """

    request_ids: tuple[str, ...]
    rounds: tuple[Floats, ...]
    answers: tuple[Floats, ...]
    at_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Seeds:
    """What operator B of the mode split gets.

    Attributes:
        request_id: of the request.
        block: which block B computes.
        seeds: (rows, 32) uint8; :func:`datamix.noise.expand_rows` makes noise of them. Groups are
            slices of K rows, in the order in which the device uses them or not at all.
        at_s: in seconds since the capture began.
    """

    request_id: str
    block: int
    seeds: npt.NDArray[np.uint8]
    at_s: float


def requests(observation: Observation) -> tuple[Group, ...]:
    """The inferences that the operator saw whole, in the order of their first rounds.

    An operator pieces them together by block numbers and order: a request for block 0 begins an
    inference; one for block b continues the inference that has waited longest for block b. A
    capture drives one inference after the other, so this is exact there; of inferences under way at
    once some may be crossed, as an operator would cross them. A retry has the request id of its
    first attempt, which counts; an inference with a round that was not answered is left out.

    Raises:
        WireError: a message that is none.
    """
    answers = _answers(observation)
    open_groups: list[list[tuple[wire.Request, float]]] = []
    seen: set[str] = set()
    for request, at_s in _sent(observation):
        if request.noise or request.request_id in seen or request.request_id not in answers:
            continue
        seen.add(request.request_id)
        if request.block == 0:
            open_groups.append([(request, at_s)])
            continue
        for group in open_groups:
            if len(group) == request.block:
                group.append((request, at_s))
                break
    blocks = len(observation.public.manifest.blocks)
    return tuple(
        Group(
            tuple(request.request_id for request, _ in group),
            tuple(wire.dequantise(request.features, request.scale) for request, _ in group),
            tuple(answers[request.request_id].values() for request, _ in group),
            tuple(at_s for _, at_s in group),
        )
        for group in open_groups
        if len(group) == blocks
    )


def seeds(observation: Observation) -> tuple[Seeds, ...]:
    """The requests for noise, in the order of time; operator A sees none.

    Raises:
        WireError: a message that is none.
    """
    seen: set[str] = set()
    found = []
    for request, at_s in _sent(observation):
        if request.noise and request.request_id not in seen:
            seen.add(request.request_id)
            rows = np.ascontiguousarray(request.features).view(np.uint8)
            found.append(Seeds(request.request_id, request.block, rows, at_s))
    return tuple(found)


def count_groups(observation: Observation) -> int:
    """How many groups the operator can tell; for B those that it made noise for."""
    if observation.operator == "A":
        return len(requests(observation))
    rows = sum(len(item.seeds) for item in seeds(observation) if item.block == 0)
    return rows // observation.public.manifest.group_size


def _sent(observation: Observation) -> Iterator[tuple[wire.Request, float]]:
    for message in observation.messages:
        if message.direction == "up":
            yield wire.decode_request(message.body, max_bytes=1 << 26), message.at_s


def _answers(observation: Observation) -> dict[str, wire.Response]:
    found = {}
    for message in observation.messages:
        if message.direction == "down":
            response = wire.decode_response(message.body)
            if response.status == 200:
                found[response.request_id] = response
    return found


# ------------------------------------------------------------------ pictures


def picture_shape(preprocessing: Preprocessing) -> tuple[int, int, int]:
    """(C, H, W) of one claimed input: an image's own, or (1, n_mels, frames) of a clip."""
    channels, height, width = preprocessing.input_shape
    return channels, height, width


def picture_range(preprocessing: Preprocessing) -> tuple[float, float]:
    """The lowest and the highest value of a picture: 0..1 for images, -1..1 for log-mel."""
    return (0.0, 1.0) if isinstance(preprocessing, ImagePreprocessing) else (-1.0, 1.0)


def pictures(preprocessing: Preprocessing, raw: Array) -> Floats:
    """Raw inputs in the units in which an attack claims them: pictures (n, C, H, W) float32.

    Images: pixel values from 0 to 1. Audio: log-mel as the stem takes it, standardised, divided by
    :data:`LOG_MEL_RANGE` and cut to -1..1.

    Raises:
        ConfigError: inputs of another shape, type or range.
    """
    return to_pictures(preprocessing, preprocessor(preprocessing)(raw))


def to_pictures(preprocessing: Preprocessing, inputs: Array) -> Floats:
    """What the stem takes, (n, *input_shape), as pictures of the same shape; see `pictures`."""
    low, high = picture_range(preprocessing)
    if isinstance(preprocessing, ImagePreprocessing):
        mean, std = _columns(preprocessing)
        shown = inputs * std + mean
    else:
        shown = inputs / np.float32(LOG_MEL_RANGE)
    cut: Floats = np.clip(shown, low, high).astype(np.float32)
    return cut


def from_pictures(preprocessing: Preprocessing, shown: Array) -> Floats:
    """The reverse of :func:`to_pictures`, but for what that cut off."""
    if isinstance(preprocessing, ImagePreprocessing):
        mean, std = _columns(preprocessing)
        inputs: Floats = ((shown - mean) / std).astype(np.float32)
        return inputs
    scaled: Floats = (shown * LOG_MEL_RANGE).astype(np.float32)
    return scaled


def _columns(preprocessing: ImagePreprocessing) -> tuple[Floats, Floats]:
    mean = np.asarray(preprocessing.mean, np.float32)[:, None, None]
    return mean, np.asarray(preprocessing.std, np.float32)[:, None, None]

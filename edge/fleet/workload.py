"""What a device asks of the cloud, and which answer is right.

A workload starts one generator per inference: it yields each round, is sent the decoded response,
and returns an :class:`Outcome`. The shard that drives it knows sockets and time, the workload knows
values.

    bundle   real inputs: mixing, de-mixing, bridges and head run, with fresh coefficients per round
    echo     noise that a cloud without a model sends back: the load without the arithmetic
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from datamix.envelope import Envelope
from datamix.errors import AnswerError
from datamix.framing import Buffer
from datamix.wire import Response, dequantise, quantise
from edge.fleet.stages import Stages, TimedDevice, TimedMode
from edge.modes import check_mode, mode_of, wire_dtype
from edge.session import Device, Round, infer_group

if TYPE_CHECKING:
    from datamix.bundle import Manifest
    from datamix.framing import Dtype
    from edge.fleet.offline import Offline

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an answered inference was worth.

    Attributes:
        wrong: an answer differed from the locally computed one.
        correct: how many of the group's inputs got their labelled class; 0 without labels.
        correct_local: the same for the classes computed locally; 0 without a reference.
    """

    wrong: bool = False
    correct: int = 0
    correct_local: int = 0


_RIGHT, _WRONG = Outcome(), Outcome(True)


class Sealed:
    """A round whose rows are encoded already.

    Attributes:
        envelope: makes the message, and knows the block.
        rows: the values as they travel, in parts.
        message: the whole message, kept by whoever made it; empty until then.
    """

    __slots__ = ("envelope", "message", "rows")

    def __init__(self, envelope: Envelope, rows: Sequence[Buffer]) -> None:
        """Put rows in an envelope that is still open."""
        self.envelope = envelope
        self.rows = rows
        self.message = b""

    def seal(self, request_id: str, deadline_s: float) -> bytes:
        """Make the message; see :meth:`datamix.envelope.Envelope.seal`."""
        self.message = message = self.envelope.seal(self.rows, request_id, deadline_s)
        return message

    @property
    def block(self) -> int:
        """Which block of the backbone."""
        return self.envelope.block

    @property
    def features(self) -> Array:
        """(rows, *shape) float16, the rows as values."""
        return np.frombuffer(b"".join(self.rows), np.float16).reshape(self.envelope.shape)

    def echoes(self, features: Array) -> bool:
        """Whether the message holds these very bytes as its rows."""
        envelope = self.envelope
        # Compares in place: the bytes of an array that is contiguous, as decoded ones are.
        return features.nbytes == envelope.size_bytes and self.message.startswith(
            features.data, envelope.rows_at
        )


Question = Round | Sealed

Inference = Generator[Question, Response, Outcome]


class Workload(Protocol):
    """One kind of question; one instance serves all devices of a process.

    Attributes:
        rows: of a message.
        rounds: messages of an inference.
        dtype: value type of what leaves.
    """

    rows: int
    rounds: int
    dtype: Dtype

    @property
    def stages(self) -> Stages | None:
        """How long the device's steps took since it was cleared; None where none run."""
        ...

    def start(self, index: int) -> Inference:
        """Begin the fleet's inference number ``index``."""
        ...


class EchoWorkload:
    """Rows of noise, for a cloud that answers with the very rows it got.

    Every message differs from every other in the first values of each row, which spell the
    inference's number, so that an answer that belongs to another request is seen.
    """

    rounds = 1
    dtype: Dtype = "float16"
    stages: Stages | None = None
    _POOL = 64  # messages of noise to choose from; what differs is put before their rows' rest
    _DIGIT = 1024  # float16 holds whole numbers exactly up to 2048
    _STAMP = 3  # digits

    def __init__(self, shape: tuple[int, ...], rows: int, seed: int, verify: bool) -> None:
        """Draw the noise: rows of ``shape``, float16, so that the wire changes nothing."""
        self.rows = rows
        self.verify = verify
        self._envelope = Envelope((rows, *shape))
        self._shape = (rows, *shape)
        noise = np.random.default_rng(seed).standard_normal((self._POOL, rows, *shape), np.float32)
        values = noise.astype(np.float16).reshape(self._POOL, rows, -1)
        stamped = min(self._STAMP, values.shape[2])
        self._places = range(1, stamped)
        self._rests = [[row[stamped:].tobytes() for row in message] for message in values]
        # Encoded once: the stamp's digits cost more than all the noise behind them otherwise.
        self._codes = [code.tobytes() for code in np.arange(2 * self._DIGIT, dtype=np.float16)]

    def start(self, index: int) -> Inference:
        """Send one message of noise and compare the answer bit by bit."""
        codes, digit = self._codes, self._DIGIT
        first = index % digit
        others = b"".join([codes[index // digit**place % digit] for place in self._places])
        rows: list[bytes] = []
        for row, rest in enumerate(self._rests[index % self._POOL]):
            rows += (codes[first + row % digit], others, rest)
        question = Sealed(self._envelope, rows)
        features = (yield question).features
        if features.shape != self._shape:
            raise AnswerError(f"the answer has shape {features.shape}, expected {self._shape}")
        return _WRONG if self.verify and not question.echoes(features) else _RIGHT


@dataclass(frozen=True, slots=True)
class Reference:
    """What is right, computed locally from the same bundle.

    Attributes:
        classes: (n,) the class of each input, without mixing and without a cloud.
        tolerance: the largest deviation that the arithmetic explains, relative to max(1, |value|).
        outputs: per block, (n, *output_shape) float32, where what the device restores is exact;
            else empty.
        recompute: (block, rows) -> the block's output, where it is not (blocks that are not linear,
            noise that stays): then only the answer to the very rows that were sent can be compared,
            and each is computed twice.
    """

    classes: npt.NDArray[np.int64]
    tolerance: float
    outputs: tuple[Floats, ...] = ()
    recompute: Callable[[int, Floats], Floats] | None = None

    def differs(self, values: Array, expected: Array) -> bool:
        """Whether any value is further from what it should be than arithmetic can take it."""
        bound = self.tolerance * np.maximum(1, np.abs(expected))
        return bool((np.abs(values - expected) > bound).any())


class _Checked:
    """A device that compares what it restored with the reference, and otherwise is the device."""

    __slots__ = ("_chosen", "_device", "_reference", "wrong")

    def __init__(self, device: Device, reference: Reference, chosen: Array) -> None:
        self._device = device
        self._reference = reference
        self._chosen = chosen
        self.wrong = False

    @property
    def manifest(self) -> Manifest:
        return self._device.manifest

    def preprocess(self, raw: Array) -> Floats:
        return self._device.preprocess(raw)

    def stem(self, inputs: Array) -> Floats:
        return self._device.stem(inputs)

    def bridge(self, index: int, features: Array) -> Floats:
        self._compare(index, features)
        return self._device.bridge(index, features)

    def head(self, features: Array) -> Floats:
        self._compare(-1, features)
        return self._device.head(features)

    def _compare(self, block: int, features: Array) -> None:
        if self._reference.outputs:
            expected = self._reference.outputs[block][self._chosen]
            self.wrong |= self._reference.differs(features, expected)


class BundleWorkload:
    """Groups of real inputs: stem (cached), protecting, cloud, restoring, bridges and head."""

    def __init__(
        self,
        device: Device,
        features: Floats,
        labels: Array | None,
        choice: Array,
        reference: Reference | None,
        mode: str | None = None,
        offline: Offline | None = None,
    ) -> None:
        """Take what was computed once per process.

        Args:
            device: bridges, head and manifest.
            features: (n, C, H, W) float32, the stem's output for each input.
            labels: (n,) the inputs' classes, or None.
            choice: (inferences, K) which inputs each inference classifies.
            reference: what the answers must be; None to take them as they come.
            mode: what leaves the device; None for the mode that the bundle was made for.
            offline: in the mode split, where masks come from; one group's must be ready whenever an
                inference begins.

        Raises:
            ConfigError: the bundle was not made for that mode.
        """
        self.mode = check_mode(device.manifest, mode)
        self.dtype = wire_dtype(device.manifest, self.mode)
        self.rows = device.manifest.group_size
        self.rounds = len(device.manifest.blocks)
        self._stages = Stages()
        self._device: Device = TimedDevice(device, self._stages)
        self._features = features
        self._labels = labels
        self._choice = choice
        self._reference = reference
        self._offline = offline

    @property
    def stages(self) -> Stages:
        """See :class:`Workload`."""
        return self._stages

    def start(self, index: int) -> Inference:
        """Infer one group; in the mode split, take its masks first."""
        chosen = self._choice[index]
        reference = self._reference
        if reference is None:
            outputs, wrong = yield from self._drive(self._device, chosen, None)
        else:
            checked = _Checked(self._device, reference, chosen)
            outputs, wrong = yield from self._drive(checked, chosen, reference.recompute)
            wrong |= checked.wrong
        if self._labels is None:
            return Outcome(wrong)
        labels = self._labels[chosen]
        local = 0 if reference is None else int((reference.classes[chosen] == labels).sum())
        return Outcome(wrong, int((outputs.argmax(axis=1) == labels).sum()), local)

    def _drive(
        self, device: Device, chosen: Array, recompute: Callable[[int, Floats], Floats] | None
    ) -> Generator[Round, Response, tuple[Floats, bool]]:
        """Take one group through its rounds; return its outputs, and whether an answer differed."""
        wrong = False
        masks = None if self._offline is None else self._offline.take()
        protection = TimedMode(mode_of(device.manifest, self.mode, masks), self._stages)
        inference = infer_group(device, self._features[chosen], protection)
        try:
            question = next(inference)
            while True:
                response = yield question
                values = response.values()
                if recompute is not None and self._reference is not None:
                    # What the cloud computed on is what came through the wire.
                    sent = dequantise(*quantise(question.features, self.dtype))
                    expected = recompute(question.block, sent)
                    wrong |= values.shape != expected.shape
                    wrong = wrong or self._reference.differs(values, expected)
                question = inference.send(values)
        except StopIteration as end:
            return end.value, wrong
        finally:  # also where the inference is given up: what hid this group hides no other
            inference.close()
            if masks is not None:
                masks.wipe()

"""What each part of a split model costs: parameters, FLOPs, activations, bytes on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from datamix.errors import ConfigError
from datamix.framing import DTYPES, STEPS, Dtype
from datamix.models.flops import Part, collapsed, parts_of, values_in
from datamix.models.memory import peak_values
from datamix.models.split import Shape, SplitModel

_SCALE_BYTES = 4  # of one float32 per row, with integers
_VALUE_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "int8": 1, "int16": 2}


@dataclass(frozen=True, slots=True)
class PartCosts:
    """One part, for one input.

    Attributes:
        name: ``stem``, ``block 0``, ``bridge 0`` ... ``head``, in the order of computation.
        side: who runs it.
        parameters: learned values.
        flops: two per multiply-add, layer by layer.
        flops_collapsed: the cheapest known way to compute a linear block; None for other parts.
        output_shape: of what it gives.
        output_values: how many values that is.
        peak_values: the most values alive at once, as torch runs it; its input included.
    """

    name: str
    side: Literal["device", "cloud"]
    parameters: int
    flops: int
    flops_collapsed: int | None
    output_shape: Shape
    output_values: int
    peak_values: int


@dataclass(frozen=True, slots=True)
class RoundCosts:
    """One trip to the cloud, for one input: rows and scales; the messages' framing is left out.

    Attributes:
        block: which block answers.
        bytes_up: from the device.
        bytes_down: to the device.
    """

    block: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True)
class Costs:
    """A split model's costs per input. A group sends one row per input, so K times the bytes.

    Attributes:
        parts: in the order of computation.
        rounds: one per block.
        mixing_flops: mix and de-mix on the device, in all rounds.
        group_size: K, with which ``mixing_flops`` grows; 0 leaves it out.
        wire_dtype: of the values on the wire.
    """

    parts: tuple[PartCosts, ...]
    rounds: tuple[RoundCosts, ...]
    mixing_flops: int
    group_size: int
    wire_dtype: Dtype

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(part.parameters for part in self.parts)

    @property
    def device_flops(self) -> int:
        """What the device computes, mixing included."""
        return self.mixing_flops + sum(part.flops for part in self.parts if part.side == "device")

    @property
    def cloud_flops(self) -> int:
        """What the cloud computes, layer by layer."""
        return sum(part.flops for part in self.parts if part.side == "cloud")

    @property
    def cloud_flops_collapsed(self) -> int:
        """What the cloud would have to compute at least, as far as is known."""
        return sum(
            part.flops if part.flops_collapsed is None else part.flops_collapsed
            for part in self.parts
            if part.side == "cloud"
        )

    @property
    def device_share(self) -> float:
        """The device's share of all FLOPs, 0 to 1."""
        return self.device_flops / (self.device_flops + self.cloud_flops)

    @property
    def device_share_collapsed(self) -> float:
        """The same against collapsed blocks: a cascade of linear layers flatters the cloud."""
        return self.device_flops / (self.device_flops + self.cloud_flops_collapsed)

    @property
    def bytes_up(self) -> int:
        """From the device per input, all rounds."""
        return sum(one.bytes_up for one in self.rounds)

    @property
    def bytes_down(self) -> int:
        """To the device per input, all rounds."""
        return sum(one.bytes_down for one in self.rounds)

    def to_json(self) -> dict[str, Any]:
        """Plain values: the fields and the totals."""
        totals = (
            *("parameters", "device_flops", "cloud_flops", "cloud_flops_collapsed"),
            *("device_share", "device_share_collapsed", "bytes_up", "bytes_down"),
        )
        return asdict(self) | {name: getattr(self, name) for name in totals}

    def table(self) -> str:
        """Plain lines for a terminal."""
        rows = [
            ("part", "side", "parameters", "FLOPs", "collapsed", "output", "values", "peak"),
            *(_row(part) for part in self.parts),
        ]
        lines = _aligned(rows, left=2)
        trips: list[tuple[str, ...]] = [("round", "bytes up", "bytes down")]
        trips += [
            (str(one.block), f"{one.bytes_up:,}", f"{one.bytes_down:,}") for one in self.rounds
        ]
        trips.append(("all", f"{self.bytes_up:,}", f"{self.bytes_down:,}"))
        return "\n".join(
            [
                *lines,
                "",
                *_aligned(trips, left=1),
                "",
                f"per input, {self.wire_dtype} on the wire, framing left out; "
                f"mixing with K = {self.group_size}: {self.mixing_flops:,} FLOPs on the device",
                f"device: {self.device_share:.2%} of {self.device_flops + self.cloud_flops:,} "
                f"FLOPs, {self.device_share_collapsed:.2%} with linear blocks collapsed; "
                f"{self.parameters:,} parameters in all",
            ]
        )


def costs(model: SplitModel, *, group_size: int = 0, wire_dtype: Dtype = "float16") -> Costs:
    """Compute what a model costs, by running its parts on the meta device.

    What is counted as a FLOP: :func:`datamix.models.flops.count_flops`.

    Args:
        model: on any device; its values don't matter.
        group_size: K, for the FLOPs of mixing and de-mixing; 0 leaves them out.
        wire_dtype: ``float32``, ``float16``, ``int8`` or ``int16``.

    Raises:
        ConfigError: another ``wire_dtype``, or ``group_size`` below 0.
    """
    if wire_dtype not in DTYPES:
        raise ConfigError(f"wire_dtype is {wire_dtype!r}, expected one of {tuple(DTYPES)}")
    if group_size < 0:
        raise ConfigError(f"group_size is {group_size}, expected at least 0")
    parts = parts_of(model)
    blocks = [part for part in parts if not part.on_device]
    values = sum(values_in(one.input_shape) + values_in(one.output_shape) for one in blocks)
    return Costs(
        tuple(_part_costs(part) for part in parts),
        tuple(
            RoundCosts(
                index,
                row_bytes(block.input_shape, wire_dtype),
                row_bytes(block.output_shape, wire_dtype),
            )
            for index, block in enumerate(blocks)
        ),
        mixing_flops=2 * group_size * values,
        group_size=group_size,
        wire_dtype=wire_dtype,
    )


def row_bytes(shape: Shape, wire_dtype: Dtype) -> int:
    """Bytes of one row on the wire, its scale included, framing left out."""
    scale = _SCALE_BYTES if wire_dtype in STEPS else 0
    return values_in(shape) * _VALUE_BYTES[wire_dtype] + scale


def bytes_on_wire(shapes: Iterable[tuple[Shape, Shape]], wire_dtype: Dtype) -> int:
    """Bytes of one input's rows over all rounds, up and down; a message's frame is left out.

    The frame is about a kilobyte per message, which the inputs of a group share. ``shapes`` are
    the input's and the output's of each block.
    """
    return sum(row_bytes(shape, wire_dtype) for pair in shapes for shape in pair)


def _part_costs(part: Part) -> PartCosts:
    return PartCosts(
        name=part.name,
        side="device" if part.on_device else "cloud",
        parameters=sum(parameter.numel() for parameter in part.module.parameters()),
        flops=part.flops,
        flops_collapsed=None if part.on_device else collapsed(part),
        output_shape=part.output_shape,
        output_values=values_in(part.output_shape),
        peak_values=peak_values(part.module, part.input_shape),
    )


def _row(part: PartCosts) -> tuple[str, ...]:
    least = part.flops_collapsed
    return (
        part.name,
        part.side,
        f"{part.parameters:,}",
        f"{part.flops:,}",
        "" if least is None else f"{least:,}",
        "x".join(map(str, part.output_shape)),
        f"{part.output_values:,}",
        f"{part.peak_values:,}",
    )


def _aligned(rows: list[tuple[str, ...]], left: int) -> list[str]:
    """Columns of text: the first ``left`` ones to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if index < left else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]

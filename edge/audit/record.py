"""Makes a capture: the real client, one inference after the other, through transports that record.

The cloud is a real one by URL, or one in this process: the bundle's blocks on torch behind the real
wire. What is captured is what crossed, not what should have.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datamix import wire
from datamix.bundle import Manifest, load_backbone, load_device
from datamix.errors import AnswerError, DataMixError, NotFound
from datamix.models import Architecture, SplitModel, build
from datamix.noise import expand_rows
from edge.access import Access
from edge.audit.capture import Capture, Header, RecordingTransport, Tape, capture_of
from edge.audit.material import Material
from edge.audit.truth import Truth
from edge.client import Client, ClientConfig
from edge.modes import check_mode
from edge.runtime import TorchDevice
from edge.session import Array, Device
from edge.transport import InProcessTransport, StreamTransport, Transport

Report = Callable[[str], None]


class BlocksCloud:
    """An operator in this process: decodes, computes, encodes, as a backbone does."""

    def __init__(self, manifest: Manifest, blocks: nn.ModuleList) -> None:
        """Serve ``blocks``."""
        self._manifest = manifest
        self._blocks = blocks

    async def answer(self, message: bytes) -> bytes:
        """From a request's bytes to the answer's."""
        request_id = wire.peek_request_id(message)
        try:
            return self._answer(message)
        except DataMixError as error:
            return wire.encode_error(request_id, error.status, str(error))

    def _answer(self, message: bytes) -> bytes:
        request = wire.decode_request(message)
        if request.block >= len(self._blocks):
            raise NotFound(f"block is {request.block}, expected below {len(self._blocks)}")
        shape = self._manifest.blocks[request.block].input_shape
        if request.noise:
            rows = expand_rows(request.features, shape)
        else:
            rows = wire.dequantise(request.features, request.scale)
        with torch.inference_mode():
            output = self._blocks[request.block](torch.from_numpy(rows)).numpy()
        return wire.encode_response(
            output,
            dtype=request.dtype,
            request_id=request.request_id,
            model=self._manifest.name,
            model_version=self._manifest.version,
            block=request.block,
            queue_s=0.0,
            compute_s=0.0,
            batch_rows=request.rows,
            close_reason="engine_free",
        )


@dataclass(frozen=True, slots=True)
class Ends:
    """Real operators to record at; None for one in this process.

    Attributes:
        url: of operator A.
        second: of operator B, in the mode split.
        access: how both are entered.
    """

    url: str | None = None
    second: str | None = None
    access: Access = Access()  # frozen, so shared


def open_model(bundle: str | Path) -> SplitModel:
    """Both sides of a bundle as one model, eval mode, float32, no gradients to its weights.

    Raises:
        BundleError: a bundle that cannot be read or trusted.
    """
    manifest, stem, bridges, head = load_device(bundle)
    _, blocks = load_backbone(bundle)
    spec = manifest.architecture
    with torch.device("meta"):
        model = build(Architecture(spec.name, spec.options))
    model.stem, model.bridges, model.head, model.blocks = stem, bridges, head, blocks
    model.requires_grad_(False)
    return model.eval()


def open_sized(bundle: str | Path, group_size: int | None) -> Device:
    """The device's side, with groups of another size than the bundle's where one is given."""
    device = TorchDevice(bundle)
    if group_size is not None:
        update = {"group_size": group_size}
        device.manifest = device.manifest.model_copy(update=update)
    return device


def record(
    bundle: str | Path,
    device: Device,
    mode: str | None,
    material: Material,
    groups: int,
    *,
    seed: int = 0,
    repeats: int = 1,
    ends: Ends | None = None,
    config: ClientConfig | None = None,
    report: Report | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Capture, Truth]:
    """Infer ``groups`` groups of victims, one after the other, and keep what crossed the wire.

    Args:
        bundle: for the blocks, where an end is in this process.
        device: its manifest says K and the shapes.
        mode: what leaves the device; None for the bundle's own.
        material: victims are drawn from its gallery.
        groups: of victims; one inference each, or ``repeats``.
        seed: of the choice of victims; what protects them comes from the operating system.
        repeats: how often each group is inferred, in a row, without a cache.
        ends: real operators.
        config: the client's patience.
        report: takes a line of progress.
        clock: monotonic seconds.

    Raises:
        ConfigError: a mode that the bundle was not made for, or fewer gallery items than K.
        DataMixError: the cloud could not be made to answer.
    """
    manifest = device.manifest
    chosen = check_mode(manifest, mode)
    chosen_members = material.victims(groups, manifest.group_size, seed)
    victims = np.repeat(chosen_members, repeats, axis=0)
    ends = ends or Ends()
    tape = Tape(clock)
    first = RecordingTransport(_end(ends.url, bundle, manifest, ends.access), tape, "A")
    second: Transport | None = None
    if chosen == "split":
        second = RecordingTransport(_end(ends.second, bundle, manifest, ends.access), tape, "B")
    raw = (material.gallery[members] for members in victims)
    split = second is not None
    client = partial(
        Client, first, device, mode=chosen, second=second, allow_same_operator=split, config=config
    )
    asyncio.run(_drive(client, raw, len(victims), report or (lambda _: None)))
    header = Header(
        mode=chosen,
        model=manifest.name,
        model_version=manifest.version,
        group_size=manifest.group_size,
    )
    return capture_of(header, tape.messages), Truth(victims, material.digest(), seed)


def _end(url: str | None, bundle: str | Path, manifest: Manifest, access: Access) -> Transport:
    if url is not None:
        return StreamTransport(url, manifest.name, access)
    _, blocks = load_backbone(bundle)
    return InProcessTransport(BlocksCloud(manifest, blocks).answer)


async def _drive(
    make: Callable[[], Client], groups: Iterable[Array], count: int, report: Report
) -> None:
    async with make() as client:
        for index, raw in enumerate(groups):
            outputs = await client.infer(raw)
            if not np.isfinite(outputs).all():
                raise AnswerError("the outputs hold NaN or Inf, expected finite values")
            if (index + 1) % 50 == 0 or index + 1 == count:
                report(f"recorded {index + 1} of {count} inferences")

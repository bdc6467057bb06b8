"""The device's SDK: ``Client(url, bundle).infer(inputs)``, and the same without ``await``.

    inputs -> stem -> groups of K -> every round of each group through the cloud -> outputs

Retries are in :mod:`edge.requester`, what protects a round in :mod:`edge.modes`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import secrets
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt

from datamix import wire
from datamix.errors import ConfigError
from edge.access import Access
from edge.closing import Closing
from edge.masks import MaskPool
from edge.mixing import decoys, random_order
from edge.modes import mode_of, wire_dtype
from edge.offline import fetch_from
from edge.operators import Operators, check_ends
from edge.promises import promise
from edge.requester import ClientConfig as ClientConfig
from edge.requester import Requester
from edge.requester import RetryBudget as RetryBudget
from edge.session import Device, Floats, Round, infer_group
from edge.tracing import span
from edge.transport import StreamTransport, Transport, UnaryTransport

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from datamix.bundle import Manifest
    from edge.cache import AnswerCache
    from edge.ledger import Ledger

Array = npt.NDArray[Any]
T = TypeVar("T")

_logger = logging.getLogger(__name__)


class Client:
    """Infers through a cloud that sees no single input in the clear; how little, its mode says.

    Attributes:
        device: the device's parts of the network.
        mode: what protects what leaves.
        promise: what that is worth.
        not_private: in the mode split, why the two ends seem to have one operator, so that nothing
            is promised; None where nothing says so, or they were not asked yet.
        cloud: the end that gets the features.
        masks_from: in the mode split, the end that gets seeds; else None.
    """

    def __init__(
        self,
        url: str | Transport,
        bundle: str | os.PathLike[str] | Device,
        *,
        transport: Literal["stream", "unary"] = "stream",
        mode: str | None = None,
        token: str | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        second: str | Transport | None = None,
        second_token: str | None = None,
        allow_same_operator: bool = False,
        ledger: Ledger | None = None,
        source: str = "device",
        session: str | None = None,
        cache: AnswerCache | None = None,
        config: ClientConfig | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Open the bundle; the cloud is contacted on the first inference.

        Args:
            url: base URL of the cloud, ``http(s)://host:port``, or a transport of one's own.
            bundle: folder or URI of the bundle (manifest and device weights are read, and run by
                onnxruntime or torch), or a device; see :func:`edge.device.open_device`.
            transport: which transport to use with a URL.
            mode: what leaves the device; None for the mode that the bundle was made for.
            token: bearer token, where the cloud wants one.
            ca_file: PEM file of the authorities that may vouch for an ``https`` cloud; None for
                those that this machine trusts.
            second: in the mode split, the second operator's URL or transport.
            second_token: bearer token for that one.
            allow_same_operator: in the mode split, go on where both ends seem to have one operator,
                which is not private. Transports of one's own cannot be asked, so they need it.
            ledger: where the bits of each input are charged before it leaves; None for nowhere.
            source: whose inputs these are, for the ledger: what a budget belongs to.
            session: a name for this client's life in the ledger; None for a random one.
            cache: answers to inputs that came before, which are not sent again; None for none.
            config: timeouts, retries, concurrency.
            tracer: OpenTelemetry's, for spans of what this client does and, where the cloud traces
                too, of what it does with it (docs/tracing.md); None for none.

        Raises:
            BundleError: the bundle cannot be read or trusted.
            ConfigError: the bundle was made for another mode, the URL, the token or the file of
                authorities is none, or a second end is missing or not of use.
        """
        if isinstance(bundle, str | os.PathLike):
            from edge.device import open_device  # a fleet's clients bring devices of their own

            bundle = open_device(Path(bundle) if isinstance(bundle, os.PathLike) else bundle)
        self.device: Device = bundle
        manifest = self.device.manifest
        self.promise = promise(manifest, mode)
        self.mode = self.promise.mode
        self.config = config or ClientConfig()
        self._ledger = ledger
        self._source = source
        self._session = session or secrets.token_hex(4)
        self._cache = cache
        self._tracer = tracer
        self._slots = asyncio.Semaphore(self.config.max_groups)
        self._dtype = wire_dtype(manifest, self.mode, self.config.wire_dtype)
        ca = None if ca_file is None else os.fspath(ca_file)
        first, other = Access(token, ca), Access(second_token, ca)
        self._operators = _check_ends(self.mode, (url, second), (first, other), allow_same_operator)
        name = "operator A" if self.mode == "split" else ""
        self.cloud = Requester(_open(url, manifest, first, transport), self.config, name)
        self.masks_from: Requester | None = None
        self._masks: MaskPool | None = None
        if second is not None:
            end = _open(second, manifest, other, transport)
            self.masks_from = Requester(end, self.config, "operator B")
            self._fetch_masks = fetch_from(self.masks_from, manifest, self.config.timeout_s)
            self._masks = MaskPool(
                self._fetch_masks, manifest.blocks, manifest.group_size, self.config.masks_ahead
            )

    @property
    def not_private(self) -> str | None:
        """See the class."""
        if self.mode != "split":
            return None
        if self._operators is None:
            return "transports of one's own do not say who runs them"
        return self._operators.same

    @property
    def privacy(self) -> str:
        """The mode, its promise and its known break, in a sentence or two."""
        return self.promise.sentence(self.not_private)

    @property
    def retries(self) -> int:
        """Attempts made beyond the first of each request, at all ends."""
        return sum(end.retries for end in self._ends)

    @property
    def bytes_up(self) -> int:
        """Bytes of all requests sent, to all ends."""
        return sum(end.bytes_up for end in self._ends)

    @property
    def bytes_down(self) -> int:
        """Values of all responses of all ends, in bytes, without framing."""
        return sum(end.bytes_down for end in self._ends)

    @property
    def _ends(self) -> tuple[Requester, ...]:
        return (self.cloud,) if self.masks_from is None else (self.cloud, self.masks_from)

    async def __aenter__(self) -> Self:
        """Use as ``async with Client(...) as client``."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close on the way out."""
        await self.close()

    async def close(self) -> None:
        """Let go of the connections, and wipe masks that nobody used."""
        if self._masks is not None:
            await self._masks.close()
        await asyncio.gather(*(end.transport.close() for end in self._ends))

    async def prefetch(self) -> None:
        """In the mode split, fetch masks now, so that the next inferences find them ready.

        Raises:
            ConfigError: the two ends seem to have one operator.
            DataMixError: operator B could not be made to answer.
        """
        if self._masks is not None:
            await self._check_operators()
            await self._masks.fill()

    async def infer(self, inputs: Array) -> Floats:
        """Infer any number of inputs.

        They are put into groups of the bundle's ``group_size`` in a random order; the last group is
        filled up with decoys of noise, whose outputs are dropped.

        Args:
            inputs: (n, *raw_shape), raw uint8 or int16, or float32 of full scale 1; see
                :meth:`edge.session.Device.preprocess`.

        Returns:
            Outputs (n, classes) float32.

        Raises:
            ConfigError: the inputs do not have the bundle's shape, or the two ends of the mode
                split seem to have one operator.
            BudgetSpent: the ledger allows no more of this source; nothing was sent.
            DataMixError: the cloud could not be made to answer in time; see
                :mod:`datamix.errors`.
        """
        if self._cache is None or not len(inputs):
            return await self._infer(inputs)
        hits, outputs = await asyncio.to_thread(self._cache.lookup, inputs)
        if not hits.all():
            # Of inputs that repeat within this call, too, one is sent.
            rows = np.flatnonzero(~hits)
            first, copies = _distinct(inputs[rows])
            fresh = inputs[rows[first]]
            found = await self._infer(fresh)
            await asyncio.to_thread(self._cache.store, fresh, found)
            outputs[rows] = found[copies]
        return outputs

    async def _infer(self, inputs: Array) -> Floats:
        """Infer inputs that nobody knows the answers of."""
        prepared = self.device.preprocess(inputs)
        if not len(prepared):
            return np.empty((0, len(self.device.manifest.class_names)), np.float32)
        await self._check_operators()
        await self._charge(len(prepared))
        with span(self._tracer, "infer", inputs=len(prepared), mode=self.mode):
            return (await self._infer_prepared(prepared))[: len(inputs)]

    async def _infer_prepared(self, prepared: Floats) -> Floats:
        """Outputs of preprocessed inputs, and of decoys behind them."""
        with span(self._tracer, "stem"):
            features = await asyncio.to_thread(self.device.stem, prepared)
        size = self.device.manifest.group_size
        if missing := -len(features) % size:
            features = np.concatenate([features, decoys(missing, features.shape[1:])])
        # Neighbours in time are often alike: which inputs share a group, and in which row each
        # stands, says nothing.
        order = random_order(len(features))
        features = features[order]

        async def group(start: int) -> Floats:
            async with self._slots:
                with span(self._tracer, "group"):
                    return await self._infer_group(features[start : start + size])

        try:
            async with asyncio.TaskGroup() as tasks:
                groups = [tasks.create_task(group(i)) for i in range(0, len(features), size)]
        except ExceptionGroup as errors:  # the first failure cancelled the others
            raise errors.exceptions[0] from None
        found = np.concatenate([task.result() for task in groups])
        outputs = np.empty_like(found)
        outputs[order] = found
        return outputs

    async def _charge(self, inputs: int) -> None:
        """Spend the bits of so many inputs; decoys tell nothing."""
        if self._ledger is None:
            return
        manifest = self.device.manifest
        spent = await asyncio.to_thread(
            self._ledger.charge,
            self._source,
            self.promise.bits_per_input * inputs,
            inputs=inputs,
            rounds=len(manifest.blocks),
            bundle=manifest.name,
            mode=self.mode,
            session=self._session,
        )
        if spent.warning:
            _logger.warning("%s", spent.warning)

    async def _infer_group(self, features: Floats) -> Floats:
        """Drive one group's session; every round is one request."""
        masks = None if self._masks is None else await self._masks.take()
        deadline_s = time.monotonic() + self.config.timeout_s
        mode = mode_of(self.device.manifest, self.mode, masks, self._dtype)
        session = infer_group(self.device, features, mode)
        try:
            step = next(session)
            while True:
                with span(self._tracer, "round", block=step.block) as parent:
                    encode = functools.partial(self._encode, step, parent)
                    answer = await self.cloud.ask(encode, deadline_s)
                step = session.send(answer)
        except StopIteration as end:
            outputs: Floats = end.value
            return outputs
        finally:
            session.close()  # and wipe the round's secret, where it failed
            if masks is not None:
                masks.wipe()

    def _encode(
        self, step: Round, traceparent: str | None, request_id: str, left_s: float
    ) -> bytes:
        manifest = self.device.manifest
        return wire.encode_request(
            step.features,
            request_id=request_id,
            dtype=self._dtype,
            model=manifest.name,
            model_version=manifest.version,
            block=step.block,
            deadline_s=left_s,
            step=step.step,
            traceparent=traceparent,
        )

    async def _check_operators(self) -> None:
        if self._operators is not None:
            await self._operators.check()


def _distinct(inputs: Array) -> tuple[list[int], list[int]]:
    """Where each distinct row stands first, and for each row which of these it equals."""
    seen: dict[bytes, int] = {}
    first: list[int] = []
    copies: list[int] = []
    for row, value in enumerate(inputs):
        key = value.tobytes()
        if key not in seen:
            seen[key] = len(first)
            first.append(row)
        copies.append(seen[key])
    return first, copies


def _check_ends(
    mode: str,
    ends: tuple[str | Transport, str | Transport | None],
    accesses: tuple[Access, Access],
    allow_same: bool,
) -> Operators | None:
    """Two operators in the mode split, one in others; those that can be asked who runs them.

    Raises:
        ConfigError: one too many or too few, or nobody can tell who runs them.
    """
    first, second = ends
    more = accesses[1].token is not None or allow_same
    check_ends(mode, second=second is not None, more=more)
    if mode != "split":
        return None
    if isinstance(first, str) and isinstance(second, str):
        return Operators((first, second), accesses, allow_same=allow_same)
    if not allow_same:
        raise ConfigError(
            "a transport of one's own cannot be asked who runs it, expected"
            " allow_same_operator, which is not private"
        )
    return None


def _open(url: str | Transport, manifest: Manifest, access: Access, kind: str) -> Transport:
    if isinstance(url, str):
        return _connect(url, manifest.name, access, kind)
    if access != Access():
        raise ConfigError("a transport of one's own came with token or ca_file, expected none")
    return url


def _connect(url: str, model: str, access: Access, transport: str) -> Transport:
    if transport == "stream":
        return StreamTransport(url, model, access)
    if transport == "unary":
        return UnaryTransport(url, model, access)
    raise ConfigError(f"transport is {transport!r}, expected 'stream' or 'unary'")


class SyncClient(Closing):
    """:class:`Client` for code without an event loop; it keeps one in a thread of its own."""

    def __init__(self, url: str | Transport, bundle: Any, **options: Any) -> None:
        """Take the same arguments as :class:`Client`, and raise the same errors."""
        self._closing = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._thread.start()
        try:
            self.client = self._run(_build(url, bundle, options))
        except BaseException:
            self._stop()
            raise

    def infer(self, inputs: Array) -> Floats:
        """See :meth:`Client.infer`. Any thread may call it.

        Raises:
            ConfigError: also where the client is closed, before or meanwhile.
        """
        return self._run(self.client.infer(inputs))

    def close(self) -> None:
        """Let go of the connection and the thread; a second call does nothing."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        try:
            asyncio.run_coroutine_threadsafe(self.client.close(), self._loop).result()
        finally:
            self._stop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        with self._closing:  # what is handed over before the closing is cancelled by it
            if self._closed:
                work.close()
                raise ConfigError("this client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise
        except CancelledError:
            raise ConfigError("this client is closed") from None

    def _stop(self) -> None:
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    """Cancel every other task of this loop and wait for them, so that nobody waits for them."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _build(url: str | Transport, bundle: Any, options: dict[str, Any]) -> Client:
    """Build a client on the loop that will run it."""
    return Client(url, bundle, **options)

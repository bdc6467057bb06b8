"""The device's SDK: ``Client(url, bundle).infer(inputs)``, and the same without ``await``.

    inputs -> stem -> groups of K -> every round of each group through the cloud -> outputs

Every attempt of a round sends the same mixtures under the same request id, so the cloud may answer
it twice without harm, and a retry tells it nothing new but how much of the deadline is left.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt

from datamix import wire
from datamix.errors import ConfigError, DataMixError, Unavailable, from_status
from edge.access import Access
from edge.mixing import decoys
from edge.session import Device, Floats, Round, infer_group
from edge.transport import StreamTransport, Transport, UnaryTransport

Array = npt.NDArray[Any]
T = TypeVar("T")

_LONGEST_BACKOFF_S = 2.0


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """How patient a client is.

    Attributes:
        timeout_s: for one group with all its rounds and retries, in seconds.
        attempt_timeout_s: for one attempt of one round, in seconds.
        retry_ratio: retries allowed per request in the long run.
        retry_reserve: retries allowed on top, so that a quiet client survives a restart.
        first_backoff_s: wait before the first retry; it doubles, with jitter, up to 2 s.
        max_groups: groups under way at once.
        wire_dtype: value type on the wire; None for the bundle's own.
    """

    timeout_s: float = 30.0
    attempt_timeout_s: float = 10.0
    retry_ratio: float = 0.1
    retry_reserve: float = 32.0
    first_backoff_s: float = 0.05
    max_groups: int = 8
    wire_dtype: wire.Dtype | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: one of them makes no sense.
        """
        for name in ("timeout_s", "attempt_timeout_s", "first_backoff_s", "max_groups"):
            if not 0 < getattr(self, name) < 1e9:  # NaN is neither
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0, finite")
        for name in ("retry_ratio", "retry_reserve"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.wire_dtype not in (None, *wire.DTYPES):
            raise ConfigError(
                f"wire_dtype is {self.wire_dtype!r}, expected one of {', '.join(wire.DTYPES)}"
            )


class RetryBudget:
    """Retries are paid for by requests, so that a struggling cloud is not hit by a retry storm.

    Each request earns ``ratio`` of a retry, up to ``reserve`` retries saved up.
    """

    def __init__(self, ratio: float, reserve: float) -> None:
        """Start with a full reserve."""
        self._ratio = ratio
        self._reserve = reserve
        self._balance = reserve

    def earn(self) -> None:
        """Count one request."""
        self._balance = min(self._reserve, self._balance + self._ratio)

    def spend(self) -> bool:
        """Pay for one retry; False where the budget is used up."""
        if self._balance < 1:
            return False
        self._balance -= 1
        return True


class Client:
    """Infers through an untrusted cloud that sees mixtures only.

    Attributes:
        retries: attempts made beyond the first of each round.
        bytes_up: bytes of all requests sent.
        bytes_down: values of all responses, in bytes, without framing.
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
        config: ClientConfig | None = None,
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
            config: timeouts, retries, concurrency.

        Raises:
            BundleError: the bundle cannot be read or trusted.
            ConfigError: the bundle was made for another mode, or the URL, the token or the file of
                authorities is none.
        """
        if isinstance(bundle, str | os.PathLike):
            from edge.device import open_device  # a fleet's clients bring devices of their own

            bundle = open_device(Path(bundle) if isinstance(bundle, os.PathLike) else bundle)
        self.device: Device = bundle
        manifest = self.device.manifest
        if mode is not None and mode != manifest.mode:
            raise ConfigError(
                f"mode is {mode!r}, but bundle {manifest.name!r} was made for {manifest.mode!r}"
            )
        if manifest.mode != "mix":
            raise ConfigError(f"mode is {manifest.mode!r}, expected 'mix', the only one so far")
        self.config = config or ClientConfig()
        if isinstance(url, str):
            access = Access(token, None if ca_file is None else os.fspath(ca_file))
            self._transport = _connect(url, manifest.name, access, transport)
        elif token is not None or ca_file is not None:
            raise ConfigError("a transport of one's own came with token or ca_file, expected none")
        else:
            self._transport = url
        self._dtype: wire.Dtype = self.config.wire_dtype or manifest.wire_dtype
        self._budget = RetryBudget(self.config.retry_ratio, self.config.retry_reserve)
        self._slots = asyncio.Semaphore(self.config.max_groups)
        self._jitter = random.Random(secrets.randbits(64))
        self.retries = 0
        self.bytes_up = 0
        self.bytes_down = 0

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
        """Let go of the connection."""
        await self._transport.close()

    async def infer(self, inputs: Array) -> Floats:
        """Infer any number of inputs.

        They are mixed in groups of the bundle's ``group_size``; the last group is filled up with
        decoys of noise, whose outputs are cut off.

        Args:
            inputs: (n, *raw_shape), raw uint8 or int16, or float32 of full scale 1; see
                :meth:`edge.session.Device.preprocess`.

        Returns:
            Outputs (n, classes) float32.

        Raises:
            ConfigError: the inputs do not have the bundle's shape.
            DataMixError: the cloud could not be made to answer in time; see
                :mod:`datamix.errors`.
        """
        prepared = self.device.preprocess(inputs)
        if not len(prepared):
            return np.empty((0, len(self.device.manifest.class_names)), np.float32)
        features = await asyncio.to_thread(self.device.stem, prepared)
        size = self.device.manifest.group_size

        async def group(start: int) -> Floats:
            async with self._slots:
                members = features[start : start + size]
                if missing := size - len(members):  # of the last group
                    members = np.concatenate([members, decoys(missing, members.shape[1:])])
                return await self._infer_group(members)

        try:
            async with asyncio.TaskGroup() as tasks:
                groups = [tasks.create_task(group(i)) for i in range(0, len(features), size)]
        except ExceptionGroup as errors:  # the first failure cancelled the others
            raise errors.exceptions[0] from None
        return np.concatenate([task.result() for task in groups])[: len(inputs)]

    async def _infer_group(self, features: Floats) -> Floats:
        """Drive one group's session; every round is one request."""
        deadline = time.monotonic() + self.config.timeout_s
        session = infer_group(self.device, features)
        step = next(session)
        while True:
            answer = await self._request(step, deadline)
            try:
                step = session.send(answer)
            except StopIteration as end:
                outputs: Floats = end.value
                return outputs

    async def _request(self, step: Round, deadline: float) -> Floats:
        """One round: attempts until it is answered, the deadline passes or the budget is spent."""
        manifest = self.device.manifest
        request_id = secrets.token_hex(12)

        def encode() -> bytes:
            return wire.encode_request(
                step.features,
                request_id=request_id,
                dtype=self._dtype,
                model=manifest.name,
                model_version=manifest.version,
                block=step.block,
                deadline_s=max(0.0, deadline - time.monotonic()),
            )

        message = encode()
        self._budget.earn()
        backoff_s = self.config.first_backoff_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                return await self._attempt(message, request_id, left_s)
            except DataMixError as error:
                if not error.retryable:
                    raise
                jitter = self._jitter.random()
                wait_s = backoff_s * (0.5 + 0.5 * jitter)
                if error.retry_after_s is not None:  # and not all at the same moment
                    wait_s = max(wait_s, error.retry_after_s * (1 + 0.1 * jitter))
                if time.monotonic() + wait_s >= deadline:
                    raise Unavailable(
                        f"gave up after {self.config.timeout_s:g} s; the last attempt: {error}"
                    ) from error
                if not self._budget.spend():
                    raise Unavailable(
                        f"the retry budget is spent; the last attempt: {error}"
                    ) from error
            self.retries += 1
            await asyncio.sleep(wait_s)
            message = encode()  # a cloud that believed the old deadline would compute in vain
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    async def _attempt(self, message: bytes, request_id: str, left_s: float) -> Floats:
        timeout_s = min(self.config.attempt_timeout_s, max(left_s, 0.001))
        self.bytes_up += len(message)
        response = await self._transport.send(message, request_id, timeout_s)
        if response.status != 200:
            raise from_status(
                response.status,
                response.error or f"the cloud answered with status {response.status}",
                retry_after_s=response.retry_after_s,
            )
        self.bytes_down += response.features.nbytes
        return response.values()


def _connect(url: str, model: str, access: Access, transport: str) -> Transport:
    if transport == "stream":
        return StreamTransport(url, model, access)
    if transport == "unary":
        return UnaryTransport(url, model, access)
    raise ConfigError(f"transport is {transport!r}, expected 'stream' or 'unary'")


class SyncClient:
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

    def __enter__(self) -> Self:
        """Use as ``with SyncClient(...) as client``."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close on the way out."""
        self.close()

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

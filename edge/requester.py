"""Requests to one end of the cloud, with retries, a deadline and a budget.

Every attempt sends the same features under the same request id, so the cloud may answer it twice
without harm, and a retry tells it nothing new but how much of the deadline is left.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datamix import wire
from datamix.errors import ConfigError, DataMixError, Unavailable, from_status
from edge.transport import Transport

Floats = npt.NDArray[np.float32]
# (request id, seconds left) -> the message.
Encode = Callable[[str, float], bytes]

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
        masks_ahead: in the mode split, for how many groups masks are kept ready.
    """

    timeout_s: float = 30.0
    attempt_timeout_s: float = 10.0
    retry_ratio: float = 0.1
    retry_reserve: float = 32.0
    first_backoff_s: float = 0.05
    max_groups: int = 8
    wire_dtype: wire.Dtype | None = None
    masks_ahead: int = 16

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: one of them makes no sense.
        """
        positive = ("timeout_s", "attempt_timeout_s", "first_backoff_s", "max_groups")
        for name in (*positive, "masks_ahead"):
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


class Requester:
    """One end of the cloud, and the patience with it.

    Attributes:
        requests: attempts made, of all requests.
        retries: attempts made beyond the first of each request.
        bytes_up: bytes of all requests sent.
        bytes_down: values of all responses, in bytes, without framing.
    """

    def __init__(self, transport: Transport, config: ClientConfig, name: str = "") -> None:
        """Send by ``transport``; errors begin with ``name``, where there are several ends."""
        self.transport = transport
        self._config = config
        self._name = name
        self._budget = RetryBudget(config.retry_ratio, config.retry_reserve)
        self._jitter = random.Random(secrets.randbits(64))
        self.requests = 0
        self.retries = 0
        self.bytes_up = 0
        self.bytes_down = 0

    async def ask(self, encode: Encode, deadline_s: float) -> Floats:
        """One request until it is answered.

        Args:
            encode: makes the message; the same but for the seconds left, each time.
            deadline_s: on the monotonic clock.

        Returns:
            The answer's values, float32.

        Raises:
            DataMixError: it could not be made to answer.
        """
        try:
            return await self._ask(encode, deadline_s)
        except DataMixError as error:
            if not self._name:
                raise
            sentence = f"{self._name}: {error}"
            raise type(error)(sentence, retry_after_s=error.retry_after_s) from error

    async def _ask(self, encode: Encode, deadline_s: float) -> Floats:
        request_id = secrets.token_hex(12)
        message = encode(request_id, max(0.0, deadline_s - time.monotonic()))
        self._budget.earn()
        backoff_s = self._config.first_backoff_s
        while True:
            left_s = deadline_s - time.monotonic()
            try:
                return await self._attempt(message, request_id, left_s)
            except DataMixError as error:
                if not error.retryable:
                    raise
                jitter = self._jitter.random()
                wait_s = backoff_s * (0.5 + 0.5 * jitter)
                if error.retry_after_s is not None:  # and not all at the same moment
                    wait_s = max(wait_s, error.retry_after_s * (1 + 0.1 * jitter))
                if time.monotonic() + wait_s >= deadline_s:
                    raise Unavailable(
                        f"gave up after {self._config.timeout_s:g} s; the last attempt: {error}"
                    ) from error
                if not self._budget.spend():
                    raise Unavailable(
                        f"the retry budget is spent; the last attempt: {error}"
                    ) from error
            self.retries += 1
            await asyncio.sleep(wait_s)
            # A cloud that believed the old deadline would compute in vain.
            message = encode(request_id, max(0.0, deadline_s - time.monotonic()))
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    async def _attempt(self, message: bytes, request_id: str, left_s: float) -> Floats:
        timeout_s = min(self._config.attempt_timeout_s, max(left_s, 0.001))
        self.requests += 1
        self.bytes_up += len(message)
        response = await self.transport.send(message, request_id, timeout_s)
        if response.status != 200:
            raise from_status(
                response.status,
                response.error or f"the cloud answered with status {response.status}",
                retry_after_s=response.retry_after_s,
            )
        self.bytes_down += response.features.nbytes
        values: Floats = response.values()
        return values

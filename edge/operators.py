"""Who runs the two ends of the mode split: what they say, and what can be seen from outside.

The mode promises nothing where both ends belong to one operator. Whether they do cannot be proved
from a device; what gives it away can be checked, before anything leaves: the names that the ends
declare, the addresses they are reached at, and the certificates they show.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from datamix.errors import AnswerError, ConfigError, DataMixError, Unavailable
from edge.access import Access, distrust

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a device can tell about one end.

    Attributes:
        name: the operator's, as the end declares it; empty where it declares none.
        addresses: of its host, as this machine resolves it.
        certificate: DER bytes of its TLS certificate; empty without TLS.
    """

    name: str
    addresses: frozenset[str]
    certificate: bytes = b""


async def look_up(url: str, access: Access) -> Endpoint:
    """Ask an end who runs it.

    Raises:
        Unavailable: it does not answer.
        AnswerError: it answers something else than ``GET /v2`` should.
        ConfigError: its certificate is not trusted.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    context = access.context(url)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(
                parts.hostname, port, type=socket.SOCK_STREAM
            )
            certificate = b""
            if context is not None:
                _, writer = await asyncio.open_connection(
                    parts.hostname, port, ssl=context, server_hostname=parts.hostname
                )
                certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
                writer.close()
            async with httpx.AsyncClient(
                headers=access.headers, verify=context or False, trust_env=False
            ) as client:
                reply = await client.get(f"{url.rstrip('/')}/v2", timeout=None)
    except (OSError, TimeoutError, httpx.HTTPError) as error:
        raise distrust(error) or Unavailable(f"cannot ask who runs it: {error!r}") from error
    try:
        body: Any = reply.json()
        name = body.get("operator", "")
    except (ValueError, AttributeError):
        name = None
    if reply.status_code != 200 or not isinstance(name, str):
        raise AnswerError(f"GET /v2 was answered with status {reply.status_code}, expected 200")
    return Endpoint(name, frozenset(str(info[4][0]) for info in found), certificate or b"")


def same_operator(first: Endpoint, second: Endpoint) -> str | None:
    """Why the two ends seem to have one operator, in a sentence; None where nothing says so."""
    if not first.name or not second.name:
        return f"{'neither' if first.name == second.name else 'only one'} end declares its operator"
    if first.name == second.name:
        return f"both ends declare the operator {first.name[:64]!r}"
    if shared := first.addresses & second.addresses:
        return f"both ends are at the address {min(shared)}"
    if first.certificate and hmac.compare_digest(first.certificate, second.certificate):
        return "both ends show the same certificate"
    return None


def check_operators(first: Endpoint, second: Endpoint, *, allow_same: bool) -> str | None:
    """Refuse one operator at both ends, unless that is allowed; then say why it is not private.

    Raises:
        ConfigError: the ends seem to have one operator.
    """
    reason = same_operator(first, second)
    if reason is not None and not allow_same:
        raise ConfigError(
            f"{reason}, expected two operators that do not share what they see (for trials there"
            " is --allow-same-operator, which is not private)"
        )
    return reason


def check_ends(mode: str, *, second: bool, more: bool = False) -> None:
    """Two operators in the mode split, one in others.

    Args:
        mode: which.
        second: whether a second operator is given.
        more: whether something else is given that only a second operator needs.

    Raises:
        ConfigError: one too many or too few.
    """
    if mode != "split" and (second or more):
        raise ConfigError(f"mode is {mode!r}, which has one operator, but a second one was given")
    if mode == "split" and not second:
        raise ConfigError("mode is 'split', but only one operator was given, expected two")


class Operators:
    """The two ends of one client, asked once.

    Attributes:
        same: why they seem to have one operator; None before :meth:`check`, or where nothing says
            so.
    """

    def __init__(
        self, urls: tuple[str, str], accesses: tuple[Access, Access], *, allow_same: bool
    ) -> None:
        """Prepare; nobody is asked yet."""
        self._urls = urls
        self._accesses = accesses
        self._allow_same = allow_same
        self._asking = asyncio.Lock()
        self._asked = False
        self.same: str | None = None

    async def check(self) -> None:
        """Ask both, the first time.

        Raises:
            ConfigError: they seem to have one operator, and that is not allowed.
            DataMixError: one of them could not be asked; says which.
        """
        async with self._asking:
            if self._asked:
                return
            ends = await asyncio.gather(
                *(
                    _named(look_up(url, access), name)
                    for name, url, access in zip("AB", self._urls, self._accesses, strict=True)
                )
            )
            self.same = check_operators(*ends, allow_same=self._allow_same)
            self._asked = True


async def _named(asking: Coroutine[Any, Any, Endpoint], name: str) -> Endpoint:
    try:
        return await asking
    except DataMixError as error:
        sentence = f"operator {name}: {error}"
        raise type(error)(sentence, retry_after_s=error.retry_after_s) from error

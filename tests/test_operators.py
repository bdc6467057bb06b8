"""Who runs the two ends: asked of real servers, over HTTP and TLS, before anything leaves."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trustme

from datamix.bundle import load_backbone, read_manifest
from datamix.errors import AnswerError, ConfigError, Conflict, Unavailable
from deployments.config import Config
from edge.access import Access
from edge.client import Client
from edge.data import sample_for
from edge.evaluate import _unmixed
from edge.operators import look_up, same_operator
from edge.runtime import TorchDevice
from tests.asynchronous import asynchronous
from tests.real_cloud import Cloud, serving
from tests.test_readme import ROOT

BUNDLE = ROOT / "bundles" / "fashion-mnist-one-round"


@asynccontextmanager
async def two(
    first: str = "acme", second: str = "other", hosts: tuple[str, str] = ("127.0.0.1", "127.0.0.2")
) -> AsyncIterator[tuple[Cloud, Cloud]]:
    """Two replicas of one bundle, each with its operator's name and address."""
    async with AsyncExitStack() as stack:
        clouds = []
        for name, host in zip((first, second), hosts, strict=True):
            config = Config(bundle=str(BUNDLE), operator=name, threads=1)
            clouds.append(await stack.enter_async_context(serving(config, host=host)))
        yield clouds[0], clouds[1]


@asynchronous
async def test_two_real_servers_together_give_what_no_cloud_would() -> None:
    device = TorchDevice(BUNDLE)
    inputs = sample_for(read_manifest(BUNDLE).preprocessing).inputs[slice(0, 11)]
    expected = _unmixed(device, load_backbone(BUNDLE)[1], device.stem(device.preprocess(inputs)))
    async with two() as (first, second):
        async with Client(first.url, device, mode="split", second=second.url) as client:
            outputs = await client.infer(inputs)
            assert client.not_private is None
            assert "operator B nothing" in client.privacy
        assert np.abs(outputs - expected).max() < 0.5  # float16 at the shipped sigma
        assert (outputs.argmax(axis=1) == expected.argmax(axis=1)).all()
        assert first.outcomes["ok"] == 3  # groups of 4, one round
        assert second.outcomes["ok"] >= 1


@pytest.mark.parametrize(
    ("names", "hosts", "reason"),
    [
        (("acme", "acme"), ("127.0.0.1", "127.0.0.2"), "both ends declare the operator 'acme'"),
        (("acme", "other"), ("127.0.0.1", "127.0.0.1"), "both ends are at the address 127.0.0.1"),
        (("", ""), ("127.0.0.1", "127.0.0.2"), "neither end declares its operator"),
    ],
)
@asynchronous
async def test_nothing_leaves_for_one_operator_at_both_ends(
    names: tuple[str, str], hosts: tuple[str, str], reason: str
) -> None:
    inputs = sample_for(read_manifest(BUNDLE).preprocessing).inputs[slice(0, 4)]
    async with two(*names, hosts=hosts) as (first, second):
        async with Client(first.url, BUNDLE, mode="split", second=second.url) as client:
            for _ in range(2):
                with pytest.raises(ConfigError, match=reason):
                    await client.infer(inputs)
        assert not first.outcomes and not second.outcomes
        options = {"mode": "split", "second": second.url, "allow_same_operator": True}
        async with Client(first.url, BUNDLE, **options) as client:  # type: ignore[arg-type]
            assert (await client.infer(inputs)).shape == (4, 10)
            assert client.not_private == reason
            assert client.privacy.startswith(f"NOT PRIVATE: {reason}")


@asynchronous
async def test_a_real_operator_b_refuses_a_seed_that_it_has_seen() -> None:
    inputs = sample_for(read_manifest(BUNDLE).preprocessing).inputs[slice(0, 4)]
    seeds = np.arange(64, dtype=np.uint8).reshape(2, 32)
    async with (
        two() as (first, second),
        Client(first.url, BUNDLE, mode="split", second=second.url) as client,
    ):
        await client.infer(inputs)
        await client._fetch_masks(0, seeds)
        with pytest.raises(Conflict, match="operator B: a seed came with another request"):
            await client._fetch_masks(0, seeds)


@asynchronous
async def test_a_server_that_is_not_there_or_none_of_ours_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot ask who runs it"):
        await look_up("http://127.0.0.1:9", Access())
    async with served(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]") as port:
        with pytest.raises(AnswerError, match="GET /v2"):
            await look_up(f"http://127.0.0.1:{port}", Access())


@asynchronous
async def test_one_certificate_at_two_addresses_is_one_operator(tmp_path: Path) -> None:
    authority = trustme.CA()
    both = authority.issue_cert("127.0.0.1", "127.0.0.2")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    access = Access(None, str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    both.configure_cert(context)
    ends = []
    for host, name in (("127.0.0.1", "acme"), ("127.0.0.2", "other")):
        body = b'{"operator": "%s"}' % name.encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
        async with served(head + body, host=host, context=context) as port:
            ends.append(await look_up(f"https://{host}:{port}", access))
    assert [end.name for end in ends] == ["acme", "other"]
    assert not ends[0].addresses & ends[1].addresses
    assert same_operator(*ends) == "both ends show the same certificate"


@asynccontextmanager
async def served(
    reply: bytes, *, host: str = "127.0.0.1", context: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A server that says ``reply`` to each request; its port."""
    import asyncio

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply)
            await writer.drain()
        except asyncio.IncompleteReadError:
            pass  # whoever only looked at the certificate
        finally:
            writer.close()

    server = await asyncio.start_server(say, host, 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()

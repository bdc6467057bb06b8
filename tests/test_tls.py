"""TLS end to end: the shipped HAProxy with the shipped template before a real replica."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import trustme

from cluster import doctor
from cluster.doctor import find_haproxy
from cluster.local import free_port
from datamix.errors import ConfigError, Unauthorized, Unavailable
from deployments.config import Config
from edge.access import Access
from edge.client import Client
from edge.fleet.config import FleetConfig
from edge.fleet.run import discover
from edge.transport import StreamTransport, Transport, UnaryTransport
from tests.asynchronous import asynchronous
from tests.fake_device import FakeDevice
from tests.real_cloud import PATIENCE_S, SHAPE, Cloud, assert_echoes, message_of, serving

TEMPLATE = Path(__file__).parents[1] / "deployments" / "tls.cfg"
TOKEN = "a-token-for-the-tls-test"
KINDS: tuple[Literal["stream", "unary"], ...] = ("stream", "unary")


class Files(NamedTuple):
    """PEM files: our authority, a certificate of it for 127.0.0.1, somebody else's authority."""

    ca: str
    certificate: str
    stranger: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return issue(tmp_path_factory.mktemp("tls"))


def issue(folder: Path) -> Files:
    """Make the files anew."""
    ours, theirs = trustme.CA(), trustme.CA()
    found = Files(*(str(folder / f"{name}.pem") for name in Files._fields))
    ours.cert_pem.write_to_path(found.ca)
    ours.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(found.certificate)
    theirs.cert_pem.write_to_path(found.stranger)
    return found


@asynccontextmanager
async def haproxy(files: Files, front_door: int) -> AsyncIterator[int]:
    """HAProxy as docs/security.md starts it; its port. It must have nothing to say."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        find_haproxy(), "-db", "-f", str(TEMPLATE),
        env={
            **os.environ,
            "DATAMIX_TLS_BIND": f"127.0.0.1:{port}",
            "DATAMIX_TLS_CERT": files.certificate,
            "DATAMIX_TLS_MAXCONN": "100",
            "DATAMIX_FRONT_DOOR": f"127.0.0.1:{front_door}",
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(PATIENCE_S):
            while process.returncode is None:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except ConnectionRefusedError:
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    break
        yield port
    finally:
        if process.returncode is None:
            process.kill()
        output, _ = await process.communicate()
    told = re.sub(rb"\[NOTICE\].*\n", b"", output)  # its version, and where its binary lies
    assert not told, told.decode()


Test = Callable[[Cloud, int], Awaitable[None]]


async def through_tls(files: Files, tmp_path: Path, test: Test) -> None:
    """Run ``test`` with a replica that wants a token, and the port of the HAProxy before it."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{TOKEN}\n")
    config = Config(
        engine="null", echo_shape=SHAPE, tokens_file=str(tokens), max_batch_rows=4096,
        max_request_rows=4096, max_queue_rows=100_000,
    )  # fmt: skip
    async with serving(config) as cloud, haproxy(files, cloud.port) as port:
        await test(cloud, port)


def transport_to(url: str, kind: str, access: Access) -> Transport:
    if kind == "stream":
        return StreamTransport(url, "echo", access)
    return UnaryTransport(url, "echo", access)


@pytest.mark.parametrize("kind", KINDS)
@asynchronous
async def test_requests_pass_with_token_and_authority(
    files: Files, tmp_path: Path, kind: Any
) -> None:
    async def test(cloud: Cloud, port: int) -> None:
        url = f"https://127.0.0.1:{port}"
        async with Client(
            url, FakeDevice(), transport=kind, token=TOKEN, ca_file=files.ca
        ) as client:
            sizes = [1, 3, 4000] * 10  # up to 150 kB, which is many TLS records
            answers = await asyncio.gather(
                *(
                    client.cloud.transport.send(message_of(seed, rows), f"r{seed}", PATIENCE_S)
                    for seed, rows in enumerate(sizes)
                )
            )
        for seed, rows in enumerate(sizes):
            assert_echoes(answers[seed], seed, rows)
        assert cloud.outcomes == {"ok": len(sizes)}
        wrong = transport_to(url, kind, Access("a-token-nobody-knows", files.ca))
        with pytest.raises(Unauthorized):
            await wrong.send(message_of(0), "r0", PATIENCE_S)
        await wrong.close()

    await through_tls(files, tmp_path, test)


@pytest.mark.parametrize("kind", KINDS)
@asynchronous
async def test_a_cloud_that_nobody_vouches_for_is_refused(
    files: Files, tmp_path: Path, kind: Any
) -> None:
    async def test(cloud: Cloud, port: int) -> None:
        for host, ca_file, why in (
            ("127.0.0.1", files.stranger, "unable to get local issuer|self.signed"),
            ("127.0.0.1", None, "unable to get local issuer|self.signed"),  # this machine's own
            ("localhost", files.ca, "(?i)hostname mismatch"),
        ):
            transport = transport_to(f"https://{host}:{port}", kind, Access(TOKEN, ca_file))
            with pytest.raises(ConfigError, match=why):
                await transport.send(message_of(0), "r0", PATIENCE_S)
            await transport.close()
        assert not cloud.outcomes  # neither token nor mixtures were sent

    await through_tls(files, tmp_path, test)


@pytest.mark.parametrize("kind", KINDS)
@asynchronous
async def test_plain_http_is_refused(files: Files, tmp_path: Path, kind: Any) -> None:
    async def test(cloud: Cloud, port: int) -> None:
        transport = transport_to(f"http://127.0.0.1:{port}", kind, Access(TOKEN))
        with pytest.raises(Unavailable):
            await transport.send(message_of(0), "r0", PATIENCE_S)
        await transport.close()
        assert not cloud.outcomes

    await through_tls(files, tmp_path, test)


@asynchronous
async def test_old_versions_of_tls_are_refused(files: Files, tmp_path: Path) -> None:
    def greet(port: int, version: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=files.ca)
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE_S) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            return secure.version()

    async def test(cloud: Cloud, port: int) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert await asyncio.to_thread(greet, port, version) is not None
        with (
            pytest.warns(DeprecationWarning),
            pytest.raises(ssl.SSLError, match="alert|unsupported"),
        ):
            await asyncio.to_thread(greet, port, ssl.TLSVersion.TLSv1_1)

    await through_tls(files, tmp_path, test)


@asynchronous
async def test_the_tools_of_the_command_line_speak_tls(files: Files, tmp_path: Path) -> None:
    async def test(cloud: Cloud, port: int) -> None:
        url = f"https://127.0.0.1:{port}"
        fleet = FleetConfig(url, workload="echo", token=TOKEN, ca_file=files.ca)
        assert (await asyncio.to_thread(discover, fleet)).model == "echo"
        stranger = FleetConfig(url, workload="echo", token=TOKEN, ca_file=files.stranger)
        with pytest.raises(ConfigError, match="not trusted"):
            await asyncio.to_thread(discover, stranger)
        context = Access(ca_file=files.ca).context(url)
        checks = await asyncio.to_thread(doctor.check_cloud, url, context)
        assert checks[0] == doctor.Check("cloud", "ok", f"{url} is ready")
        routes = await asyncio.to_thread(doctor._get, f"{url}/-/routes", 5.0, context)
        assert routes[0] == 404  # and the replica, which would say 401, was not asked

    await through_tls(files, tmp_path, test)


def test_files_of_authorities_that_are_none(files: Files, tmp_path: Path) -> None:
    (tmp_path / "junk.pem").write_text("junk")
    for path in (tmp_path / "junk.pem", tmp_path / "missing.pem", tmp_path):
        for kind in KINDS:
            with pytest.raises(ConfigError, match="^ca_file .* cannot be used"):
                Client("https://127.0.0.1:1", FakeDevice(), transport=kind, ca_file=path)
        with pytest.raises(ConfigError, match="^ca_file .* cannot be used"):
            FleetConfig("https://127.0.0.1:1", workload="echo", ca_file=str(path))
    with pytest.raises(ConfigError, match="expected https://"):
        Client("http://127.0.0.1:1", FakeDevice(), ca_file=files.ca)  # would go without TLS

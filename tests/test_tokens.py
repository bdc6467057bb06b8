"""Bearer tokens: their files, who is let in, and that nobody ever sees one."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from cluster import cli
from datamix.errors import ConfigError, Unauthorized, Unavailable
from datamix.tokens import (
    MAX_CHARACTERS,
    MIN_CHARACTERS,
    authorization,
    check_token,
    digest,
    new_token,
    read_token,
    write_token,
)
from deployments.config import Config
from deployments.tokens import MAX_TOKENS, Tokens, parse
from edge.access import Access
from edge.client import Client
from edge.fleet import pacing
from edge.fleet.config import FleetConfig
from edge.fleet.run import discover
from edge.fleet.shard import Shard
from edge.fleet.stats import fetch
from edge.fleet.workload import EchoWorkload
from edge.transport import StreamTransport, Transport, UnaryTransport
from tests.asynchronous import asynchronous
from tests.fake_device import FakeDevice, raw_inputs
from tests.fake_http import FakeHttp, Received, Reply
from tests.real_cloud import SHAPE, Cloud, HttpPeer, assert_echoes, http, message_of, serving

ALICE, BOB, EVE = "alice-alice-alice-1", "bob+bob/bob~bob.bob==", "eve-eve-eve-eve-eve"
CHARACTERS = st.characters(codec="ascii", categories=["L", "N"]) | st.sampled_from("._~+/-")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(f"# the fleet\n\n{ALICE}\n")
    return file


def replace(path: Path, text: str) -> None:
    """As an operator should: write another file, rename it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def allowed(tokens: Tokens, token: str) -> bool:
    try:
        assert tokens.check(authorization(token).encode()) == digest(token.encode())
    except Unauthorized:
        return False
    return True


# --- what a token is ----------------------------------------------------------------------------


@given(st.text(CHARACTERS, min_size=MIN_CHARACTERS, max_size=MAX_CHARACTERS))
def test_a_token_is_itself(token: str) -> None:
    assert check_token(token) == token


@pytest.mark.parametrize(
    "token",
    [
        "",
        "fifteen-letters",
        "sixteen letters!",
        "with-a-new-line\r\nX-Evil: yes",
        "trailing-new-line-\n",
        "not-ascii-not-ascii-ü",
        "=equals-at-the-start",
        "x" * (MAX_CHARACTERS + 1),
    ],
)
def test_what_is_no_token_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_token(token)
    assert not token or token not in str(raised.value)


def test_new_tokens_are_tokens_and_differ() -> None:
    drawn = {check_token(new_token()) for _ in range(100)}
    assert len(drawn) == 100
    assert all(len(token) == 43 for token in drawn)


# --- the files ----------------------------------------------------------------------------------


def test_lines_of_every_kind() -> None:
    hashed = "sha256:" + digest(BOB.encode()).hex().upper()
    text = f"# nobody\n\n  {ALICE}  # the first\n{hashed} # the second\r\n{ALICE}"
    assert parse(text) == {digest(ALICE.encode()), digest(BOB.encode())}
    assert parse("") == parse("# only words\n") == frozenset()


@pytest.mark.parametrize(
    "line",
    [
        "short",
        "two words are no token here",
        "sha256:12",
        "sha256:" + "g" * 64,
        "sha256:" + "0" * 65,
    ],
)
def test_a_wrong_line_is_named_by_its_number_only(line: str) -> None:
    with pytest.raises(ConfigError, match=r"^line 3: ") as raised:
        parse(f"{ALICE}\n\n{line}\n")
    assert line not in str(raised.value)
    assert ALICE not in str(raised.value)


def test_too_many_tokens() -> None:
    lines = [f"sha256:{number:064x}" for number in range(MAX_TOKENS + 1)]
    assert len(parse("\n".join(lines[1:]))) == MAX_TOKENS
    with pytest.raises(ConfigError, match=f"{MAX_TOKENS + 1} tokens"):
        parse("\n".join(lines))


def test_a_written_token_opens_the_door(tmp_path: Path, clock: Clock) -> None:
    line = write_token(tmp_path / "token")
    token = read_token(tmp_path / "token")
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert token not in line
    (tmp_path / "tokens").write_text(line)
    assert allowed(Tokens(str(tmp_path / "tokens"), clock), token)
    with pytest.raises(ConfigError, match="File exists"):
        write_token(tmp_path / "token")
    assert read_token(tmp_path / "token") == token


@pytest.mark.parametrize("text", ["", "# none\n", f"{ALICE}\n{BOB}\n"])
def test_a_device_has_one_token(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(ConfigError, match="expected one"):
        read_token(tmp_path / "token")


def unreadable(tmp_path: Path) -> dict[str, Path]:
    files = {name: tmp_path / name for name in ("missing", "folder", "binary", "wrong", "pipe")}
    files["folder"].mkdir()
    files["binary"].write_bytes(b"\xff" * 20)
    files["wrong"].write_text("short\n")
    os.mkfifo(files["pipe"])
    return files


@pytest.mark.parametrize("name", ["missing", "folder", "binary", "wrong", "pipe"])
def test_a_file_that_cannot_be_read_at_the_start_is_an_error(
    tmp_path: Path, clock: Clock, name: str
) -> None:
    with pytest.raises(ConfigError, match=r"^tokens_file: "):
        Tokens(str(unreadable(tmp_path)[name]), clock)


def test_a_file_that_is_too_large(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "large").write_text("# " + "x" * (1 << 20))
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        Tokens(str(tmp_path / "large"), clock)


# --- the check ----------------------------------------------------------------------------------


def test_only_the_tokens_of_the_file_are_let_in(path: Path, clock: Clock) -> None:
    path.write_text(f"{ALICE}\n{BOB}\n")
    tokens = Tokens(str(path), clock)
    assert allowed(tokens, ALICE) and allowed(tokens, BOB)
    assert tokens.check(f"bEARER   {ALICE} ".encode()) == digest(ALICE.encode())
    for header in (
        "", "Bearer", "Bearer ", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x", f"Bearer {EVE}",
        f"Bearer {ALICE[:-1]}", f"Bearer {ALICE} {BOB}", "Bearer sha256:" + digest(b"x").hex(),
    ):  # fmt: skip
        with pytest.raises(Unauthorized, match="^the bearer token is missing or unknown$"):
            tokens.check(header.encode())


def test_the_digest_is_not_the_token(path: Path, clock: Clock) -> None:
    """Who reads the file on the cluster cannot come in with what stands there."""
    hashed = digest(ALICE.encode()).hex()
    replace(path, f"sha256:{hashed}\n")
    tokens = Tokens(str(path), clock)
    assert allowed(tokens, ALICE)
    assert not allowed(tokens, hashed) and not allowed(tokens, f"sha256:{hashed}")


def test_every_entry_is_compared_whatever_was_found(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(path, f"{ALICE}\n{BOB}\n{EVE}\n")
    tokens = Tokens(str(path), clock)
    compared: list[bool] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one == other)
        return compared[-1]

    monkeypatch.setattr("deployments.tokens.hmac.compare_digest", compare)
    for token in (ALICE, BOB, EVE, "nobody-of-these-three"):
        compared.clear()
        allowed(tokens, token)
        assert len(compared) == 3


def test_an_empty_file_lets_nobody_in(path: Path, clock: Clock) -> None:
    replace(path, "# closed\n")
    tokens = Tokens(str(path), clock)
    assert not allowed(tokens, ALICE)
    with pytest.raises(Unauthorized):
        tokens.check(b"")


# --- changes ------------------------------------------------------------------------------------


def test_a_new_file_counts_within_a_second(path: Path, clock: Clock) -> None:
    tokens = Tokens(str(path), clock)
    entry = tokens.check(authorization(ALICE).encode())
    replace(path, f"{BOB}\n")
    clock.now += 0.9
    assert allowed(tokens, ALICE)  # nobody has looked yet
    clock.now += 0.2
    assert allowed(tokens, BOB) and not allowed(tokens, ALICE)
    assert (tokens.version, tokens.holds(entry)) == (1, False)
    replace(path, "")
    clock.now += 1.1
    assert not allowed(tokens, BOB)
    assert tokens.version == 2


def test_the_file_is_not_read_again_while_it_is_the_same(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = path.stat().st_mtime - 60
    os.utime(path, (old, old))
    tokens = Tokens(str(path), clock)
    monkeypatch.setattr("deployments.tokens.read_file", lambda path: pytest.fail("was read"))
    for _ in range(5):
        clock.now += 2
        assert allowed(tokens, ALICE)
    assert tokens.version == 0


def test_a_change_that_leaves_no_trace_is_seen_all_the_same(path: Path, clock: Clock) -> None:
    """Same size, inode and time: as two writes within one step of the file system's clock."""
    tokens = Tokens(str(path), clock)
    before = path.stat()
    path.write_text(path.read_text().replace(ALICE, EVE))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    clock.now += 1.1
    assert allowed(tokens, EVE) and not allowed(tokens, ALICE)


@pytest.mark.parametrize("name", ["missing", "folder", "binary", "wrong", "pipe"])
def test_a_broken_new_file_changes_nothing_and_is_told_once(
    tmp_path: Path, path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO)
    tokens = Tokens(str(path), clock)
    path.unlink()
    bad = unreadable(tmp_path)[name]
    if name != "missing":
        bad.rename(path)
    for _ in range(3):
        clock.now += 1.1
        assert allowed(tokens, ALICE) and not allowed(tokens, "short")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("the tokens stay as they were: tokens_file: ")
    assert "short" not in caplog.text
    replace(path, f"{BOB}\n") if name != "folder" else None
    if name != "folder":
        clock.now += 1.1
        assert allowed(tokens, BOB)
        assert caplog.records[-1].getMessage() == "the tokens were read again, there are 1"


def test_nothing_shows_a_token(path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    tokens = Tokens(str(path), clock)
    replace(path, f"{BOB}\n")
    clock.now += 2
    with pytest.raises(Unauthorized) as raised:
        tokens.check(authorization(EVE).encode())
    shown = f"{tokens!r} {raised.value!r} {caplog.text}"
    for token in (ALICE, BOB, EVE):
        assert token not in shown
        assert digest(token.encode()).hex() not in shown


# --- over sockets -------------------------------------------------------------------------------


def run(test: Callable[[Cloud], Awaitable[None]], path: Path) -> None:
    async def go() -> None:
        config = Config(engine="null", echo_shape=SHAPE, tokens_file=str(path))
        async with serving(config) as cloud:
            await test(cloud)

    asyncio.run(go())


def with_token(peer: HttpPeer, token: str | None) -> HttpPeer:
    peer.headers = {} if token is None else {"Authorization": authorization(token)}
    return peer


def test_requests_without_a_token_are_refused(path: Path) -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            for token in (None, EVE):
                with_token(peer, token)
                for reply in (
                    await peer.post(message_of(0)),
                    await peer.post(b"junk"),  # nobody looks at what strangers send
                    await peer.post(b"{}", media="application/json"),
                    await peer.post(b"", path="/v2/repository/index"),
                    await peer.post(b"", path="/v2/health/live"),
                    *[
                        await peer.get(target)
                        for target in (
                            "/v2", "/v2/stats", "/v2/models/echo", "/v2/models/nobody",
                            "/v2/models/echo/ready", "/v2/models/echo/config", "/nowhere",
                        )
                    ],
                    await peer.request("DELETE", "/v2"),
                ):  # fmt: skip
                    assert reply.status == 401
                    assert reply.json() == {"error": "the bearer token is missing or unknown"}
                    assert reply.headers["www-authenticate"] == "Bearer"
                    assert reply.headers["content-type"] == "application/json"
                for target in ("/v2/health/live", "/v2/health/ready"):
                    assert (await peer.get(target)).status == 200
            with_token(peer, ALICE)
            assert (await peer.post(message_of(0))).status == 200
            for target in ("/v2", "/v2/stats", "/v2/models/echo", "/v2/models/echo/ready"):
                assert (await peer.get(target)).status == 200
            assert ALICE not in (await peer.get("/v2/stats")).body.decode()
        assert cloud.outcomes == {"ok": 1, "401": 26}

    run(test, path)


@pytest.mark.parametrize("token", [None, EVE])
def test_a_stream_without_a_token_is_refused(path: Path, token: str | None) -> None:
    headers = {} if token is None else {"Authorization": authorization(token)}

    async def test(cloud: Cloud) -> None:
        for target in ("/v2/models/echo/stream", "/v2/models/nobody/stream"):
            with pytest.raises(InvalidStatus) as raised:
                async with connect(
                    f"ws://127.0.0.1:{cloud.port}{target}", additional_headers=headers, proxy=None
                ):
                    pass
            response = raised.value.response
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.body == b'{"error": "the bearer token is missing or unknown"}'
        assert cloud.outcomes == {"401": 2}
        assert cloud.backbone.traffic.open_streams == 0

    run(test, path)


# --- the device's side --------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["stream", "unary"])
@asynchronous
async def test_a_client_shows_its_token(transport: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{ALICE}\n")
    config = Config(engine="null", echo_shape=SHAPE, tokens_file=str(file))
    device = FakeDevice(rounds=1)
    async with serving(config) as cloud:
        transports = {
            token: connect_to(cloud.url, transport, token) for token in (ALICE, EVE, None)
        }
        response = await transports[ALICE].send(message_of(1), "r1", 5)
        assert_echoes(response, 1)
        for token in (EVE, None):
            with pytest.raises(Unauthorized, match="missing or unknown"):
                await transports[token].send(message_of(1), "r1", 5)
        for opened in transports.values():
            await opened.close()
        # A client does not try again what a token is missing for.
        async with Client(cloud.url, device, transport=transport, token=EVE) as client:
            with pytest.raises(Unauthorized):
                await client.infer(raw_inputs(4))
            assert client.retries == 0


def connect_to(url: str, transport: str, token: str | None) -> Transport:
    kind = StreamTransport if transport == "stream" else UnaryTransport
    return kind(url, "echo", Access(token))


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_a_bad_token_is_refused_before_it_can_travel(transport: Any) -> None:
    bad = "token\r\nX-Evil: yes-yes-yes"
    with pytest.raises(ConfigError) as raised:
        Client("http://127.0.0.1:1", FakeDevice(), transport=transport, token=bad)
    assert "X-Evil" not in str(raised.value)
    with pytest.raises(ConfigError, match="expected none"):
        Client(connect_to("http://127.0.0.1:1", transport, None), FakeDevice(), token=ALICE)


@pytest.mark.parametrize("transport", ["stream", "unary"])
@asynchronous
async def test_nothing_of_the_client_shows_the_token(
    transport: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)

    def refuse(received: Received) -> Reply:
        assert received.headers["authorization"] == f"Bearer {ALICE}"
        return Reply(500, b"no")

    async with FakeHttp(refuse).serve() as cloud:
        client = Client(cloud.url, FakeDevice(), transport=transport, token=ALICE)
        with pytest.raises(Unavailable) as raised:
            await client.cloud.transport.send(b"x", "r1", 5)
        await client.close()
        config = FleetConfig(cloud.url, workload="echo", token=ALICE)
        with pytest.raises(Unavailable) as fetched:
            fetch(f"{cloud.url}/v2/stats", config.access)
    shown = [repr(raised.value), repr(raised.value.__cause__), repr(client), repr(config)]
    shown += [repr(client.cloud.transport), repr(config.access), repr(fetched.value), caplog.text]
    shown.append(repr(Shard(config, "echo", pacing.schedule("poisson", 1, 1, 100, 0), fake_work())))
    assert not [text for text in shown if ALICE in text]


def fake_work() -> Any:
    return EchoWorkload(SHAPE, 4, 0, True)


@asynchronous
async def test_a_fleet_shows_its_token(path: Path) -> None:
    config = Config(engine="null", echo_shape=SHAPE, tokens_file=str(path))
    async with serving(config) as cloud:
        fleet = FleetConfig(cloud.url, workload="echo", devices=3, rate=50, duration_s=0.2,
                            token=ALICE)  # fmt: skip
        assert (await asyncio.to_thread(discover, fleet)).model == "echo"
        with pytest.raises(Unauthorized):
            await asyncio.to_thread(discover, replaced(fleet, token=EVE))
        shard = Shard(fleet, "echo", pacing.schedule("poisson", 50, 0.2, 3, 0), fake_work())
        await shard.connect()
        result = await shard.run(time.monotonic())
        assert result.counters.ok == len(result.table) > 0


# --- the command line ---------------------------------------------------------------------------


def test_the_token_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str | None] = []

    def run_fleet(config: FleetConfig, *paths: Path | None) -> int:
        seen.append(config.token)
        return 0

    monkeypatch.setattr("edge.fleet.command.run", run_fleet)
    file = tmp_path / "device.token"
    assert exit_of("token", str(file)) == 0
    line = capsys.readouterr().out.strip()
    assert parse(line) == {digest(read_token(file).encode())}
    simulate = ("simulate", "--url", "http://x", "--workload", "echo")
    monkeypatch.delenv("DATAMIX_TOKEN", raising=False)
    assert exit_of(*simulate) == 0
    assert exit_of(*simulate, "--token-file", str(file)) == 0
    monkeypatch.setenv("DATAMIX_TOKEN", BOB)
    assert exit_of(*simulate) == 0
    assert exit_of(*simulate, "--token-file", str(file)) == 0
    assert seen == [None, read_token(file), BOB, read_token(file)]
    monkeypatch.setenv("DATAMIX_TOKEN", "short")
    assert exit_of(*simulate) == 2
    assert exit_of(*simulate, "--token-file", str(tmp_path / "none")) == 2
    assert exit_of("token", str(file)) == 2
    assert read_token(file) not in "".join(capsys.readouterr())


def test_serve_says_what_is_wrong_with_the_tokens_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.serve.local_cluster", lambda *a, **k: pytest.fail("Ray starts"))
    (tmp_path / "tokens").write_text("short\n")
    arguments = ("serve", "--engine", "null", "--echo-shape", "1", "--tokens-file")
    assert exit_of(*arguments, str(tmp_path / "tokens")) == 2
    assert capsys.readouterr().err.startswith("datamix: tokens_file: line 1: ")


def exit_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    return int(raised.value.code or 0)

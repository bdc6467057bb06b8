"""A replica that has started asks the others for their streams, in time for HAProxy's hard stop."""

from __future__ import annotations

import asyncio
import logging

import pytest

from deployments.peers import NoPeers, announce


class Asked:
    """Peers that remember what they were asked, or fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.within_s: list[float] = []
        self.error = error

    async def rotate(self, within_s: float) -> None:
        if self.error is not None:
            raise self.error
        self.within_s.append(within_s)


@pytest.mark.parametrize(
    ("wanted_s", "hard_stop_s", "asked_s"),
    [(60.0, None, 60.0), (600.0, None, 72.0), (60.0, "5", 3.0), (1.0, "5", 1.0)],
)
def test_streams_are_let_go_before_haproxy_cuts_them(
    monkeypatch: pytest.MonkeyPatch, wanted_s: float, hard_stop_s: str | None, asked_s: float
) -> None:
    monkeypatch.delenv("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", raising=False)
    if hard_stop_s is not None:
        monkeypatch.setenv("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", hard_stop_s)
    peers = Asked()
    asyncio.run(announce(peers, wanted_s, settle_s=0.0))
    assert peers.within_s == [asked_s]


def test_peers_that_cannot_be_asked_are_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        asyncio.run(announce(Asked(RuntimeError("secret path")), 60.0, settle_s=0.0))
    assert caplog.messages == ["the other replicas were not asked to rotate: RuntimeError"]


def test_a_replica_by_itself_asks_nobody() -> None:
    asyncio.run(announce(NoPeers(), 60.0, settle_s=0.0))

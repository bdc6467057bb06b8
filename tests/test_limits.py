"""The limit of open files, unlimited ones included."""

import resource
import sys

import pytest

from cluster.local import max_streams
from datamix import limits


def test_the_limit_is_raised_to_the_most_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1024, 20_000]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: now.__setitem__(0, pair[0]))
    assert limits.raise_descriptor_limit() == 20_000
    assert now == [20_000, 20_000]


def test_unlimited_is_a_large_number_and_not_minus_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1024, resource.RLIM_INFINITY]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: now.__setitem__(0, pair[0]))
    assert limits.raise_descriptor_limit() == sys.maxsize
    assert now[0] == resource.RLIM_INFINITY
    assert max_streams(limits.hard_descriptor_limit()) > 1_000_000


def test_haproxy_gets_what_its_descriptors_allow() -> None:
    assert max_streams(20_000) == 7920

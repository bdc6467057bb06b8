"""One real embedded cluster for all slow tests, started the way a user starts it."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.hosts import Hosts, why_not
from tests.launched import HEAD, USER, WORKERS, Launched, until
from tests.served import Served, serving

# The same examples in every run, and no wall-clock limit per example: a busy machine is not a bug.
# To explore: `pytest --hypothesis-profile=default --hypothesis-seed=random`.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Served]:
    """The shared cluster with the shipped bundle."""
    with serving() as served:
        yield served


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """Four isolated hosts, of no cluster yet; see tests/hosts.py."""
    if reason := why_not():
        pytest.skip(reason)
    with Hosts() as hosts:
        hosts.up(4)
        yield hosts


@pytest.fixture(scope="module")
def launched(hosts: Hosts) -> Iterator[Launched]:
    """A cluster on these hosts, up and serving; at the end nothing of it is left. Slow: minutes."""
    hosts.up(4)  # others may have left one without power
    cluster = Launched(hosts)
    cluster.prepare(HEAD, *WORKERS)
    cluster.up()
    until(lambda: cluster.answers(HEAD), "the first answer", 240)
    yield cluster
    cluster.down()
    # ssh keeps the last connection for ten seconds.
    until(lambda: not any(map(hosts.processes, (HEAD, *WORKERS, USER))), "the end of all", 30)

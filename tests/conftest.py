"""One real embedded cluster for all slow tests, started the way a user starts it."""

from collections.abc import Iterator

import pytest

from tests.served import Served, serving


@pytest.fixture(scope="session")
def cluster() -> Iterator[Served]:
    """The shared cluster with the shipped bundle."""
    with serving() as served:
        yield served

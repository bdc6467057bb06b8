"""One real embedded cluster for all slow tests, started the way a user starts it."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

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

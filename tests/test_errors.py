"""The error tree: one status per class, and the same class on the other side of the wire."""

from __future__ import annotations

import pickle
import re

import pytest

from datamix import errors
from datamix.errors import DataMixError, from_status

CLASSES = sorted(
    (c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, DataMixError)),
    key=lambda c: c.__name__,
)
STATUS = {
    "AnswerError": 502,
    "BudgetSpent": 403,
    "BundleError": 500,
    "ConfigError": 400,
    "Conflict": 409,
    "DataMixError": 500,
    "DeadlineExceeded": 408,
    "NonFinite": 422,
    "NotAllowed": 405,
    "NotFound": 404,
    "Overloaded": 429,
    "TooLarge": 413,
    "Unauthorized": 401,
    "Unavailable": 503,
    "Unsupported": 415,
    "WireError": 400,
}
# Raised on the side that notices; the other side sees what its status says to a device.
LOCAL = {"ConfigError", "BundleError", "AnswerError", "BudgetSpent", "DataMixError"}


def test_every_class_has_its_status() -> None:
    assert {c.__name__: c.status for c in CLASSES} == STATUS


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"[├└]── (\w+) +(\d{3})", errors.__doc__ or "")
    expected = {name: status for name, status in STATUS.items() if name != "DataMixError"}
    assert {name: int(status) for name, status in drawn} == expected


def test_only_a_full_or_absent_cloud_is_worth_another_try() -> None:
    assert {c.__name__ for c in CLASSES if c.retryable} == {"Overloaded", "Unavailable"}


@pytest.mark.parametrize("kind", [c for c in CLASSES if c.__name__ not in LOCAL])
def test_an_error_crosses_the_wire_as_itself(kind: type[DataMixError]) -> None:
    there = kind("queue is full", retry_after_s=0.25)
    here = from_status(there.status, str(there), retry_after_s=there.retry_after_s)
    assert type(here) is kind
    assert str(here) == "queue is full"
    assert here.retry_after_s == 0.25


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_whatever_a_proxy_says_when_nobody_computed_is_retryable(status: int) -> None:
    error = from_status(status, "no replica")
    assert type(error) is errors.Unavailable
    assert error.retryable


@pytest.mark.parametrize("status", [0, 200, 204, 301, 402, 403, 418, 501, 599, 999_999])
def test_an_unknown_status_is_an_error_that_is_not_retried(status: int) -> None:
    error = from_status(status, "odd")
    assert type(error) is DataMixError
    assert not error.retryable


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_a_process_boundary(kind: type[DataMixError]) -> None:
    # Ray and the fleet's processes hand errors over by pickle.
    copy = pickle.loads(pickle.dumps(kind("a sentence", retry_after_s=1.5)))
    assert type(copy) is kind
    assert str(copy) == "a sentence"
    assert copy.retry_after_s == 1.5


def test_without_a_known_wait_there_is_none() -> None:
    assert DataMixError("a sentence").retry_after_s is None

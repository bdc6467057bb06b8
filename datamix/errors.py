"""One error tree for both sides of the wire.

    DataMixError
    ├── ConfigError        400  a setting or an argument is wrong
    ├── WireError          400  bytes that are not a valid message
    ├── Unauthorized       401  token missing or wrong
    ├── BudgetSpent        403  the privacy budget of an input source does not allow it
    ├── NotFound           404  unknown model, version or block
    ├── NotAllowed         405  a method the endpoint does not know
    ├── DeadlineExceeded   408  the deadline passed before the work began
    ├── Conflict           409  a seed of noise that was used before
    ├── TooLarge           413  more bytes or rows than allowed
    ├── Unsupported        415  a media type the cloud does not read
    ├── NonFinite          422  NaN or Inf among the values
    ├── Overloaded         429  queue full: come back after ``retry_after_s``
    ├── BundleError        500  a bundle that cannot be read or trusted
    ├── AnswerError        502  the cloud answered, but not what was asked
    └── Unavailable        503  draining, no replica, engine fault, connection lost

Each class knows its HTTP status and whether sending the same request again can help. A message is
one plain sentence: what, got, expected. It never holds payload values, paths of the server or a
traceback, because it travels to the other side.
"""

from __future__ import annotations

from typing import ClassVar


class DataMixError(Exception):
    """Base of every error that DataMix raises on purpose.

    Attributes:
        status: the HTTP status this error travels as.
        retryable: whether the same request may succeed later.
        retry_after_s: how long to wait before trying again, in seconds, where that is known.
    """

    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, sentence: str, *, retry_after_s: float | None = None) -> None:
        """Keep the sentence and, where known, the wait in seconds."""
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class ConfigError(DataMixError):
    """A setting or an argument is wrong."""

    status = 400


class WireError(DataMixError):
    """Bytes that are not a valid message."""

    status = 400


class Unauthorized(DataMixError):
    """The token is missing or wrong."""

    status = 401


class BudgetSpent(DataMixError):
    """The privacy budget of an input source does not allow it; the device's own refusal.

    No answer of a cloud becomes one: a 403 from there says nothing about the device's budget.
    """

    status = 403


class NotFound(DataMixError):
    """Unknown model, version or block."""

    status = 404


class NotAllowed(DataMixError):
    """A method the endpoint does not know."""

    status = 405


class DeadlineExceeded(DataMixError):
    """The deadline passed before the work began, or before the answer came."""

    status = 408


class Conflict(DataMixError):
    """A seed of noise that another request has used."""

    status = 409


class TooLarge(DataMixError):
    """More bytes or rows than the receiver accepts."""

    status = 413


class Unsupported(DataMixError):
    """A media type the cloud does not read."""

    status = 415


class NonFinite(DataMixError):
    """NaN or Inf among the values."""

    status = 422


class Overloaded(DataMixError):
    """The queue is full; ``retry_after_s`` says when it should have room."""

    status = 429
    retryable = True


class BundleError(DataMixError):
    """A bundle that cannot be read or trusted."""

    status = 500


class AnswerError(DataMixError):
    """The cloud answered, but not what was asked: wrong shape, wrong id, values not finite."""

    status = 502


class Unavailable(DataMixError):
    """Draining, no replica, engine fault, or the connection is lost."""

    status = 503
    retryable = True


_BY_STATUS: dict[int, type[DataMixError]] = {
    400: WireError,
    401: Unauthorized,
    404: NotFound,
    405: NotAllowed,
    408: DeadlineExceeded,
    409: Conflict,
    413: TooLarge,
    415: Unsupported,
    422: NonFinite,
    429: Overloaded,
    503: Unavailable,
    # HAProxy turns its own 502, 503 and 504 into 500; the cloud itself never answers 500, 502 or
    # 504. All of them mean "nobody computed this": worth another try.
    500: Unavailable,
    502: Unavailable,
    504: Unavailable,
}


def from_status(status: int, sentence: str, *, retry_after_s: float | None = None) -> DataMixError:
    """Rebuild the error that an answer with ``status`` carries, on the device's side.

    An unknown status becomes a plain :class:`DataMixError`, which is not retried.
    """
    return _BY_STATUS.get(status, DataMixError)(sentence, retry_after_s=retry_after_s)

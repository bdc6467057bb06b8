"""What a replica writes down: one line a time, with the request's id, and never too many.

Nothing here holds a value of an input: messages name types, sizes and ids. The same message is
written a few times a second at most, and the next one says how many were left out: an engine that
fails on every request must not fill a disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

from deployments.allowance import Allowance

Form = Literal["text", "json"]

_LOGGERS = ("datamix", "deployments")
_PER_S = 5.0
_MAX_MESSAGES = 1000
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_FIELDS = ("request_id", "status", "model", "model_version", "error")


class RateLimit(logging.Filter):
    """Lets a message through ``per_s`` times a second, whatever its arguments are."""

    def __init__(self, per_s: float = _PER_S, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing left out."""
        super().__init__()
        self._per_s = per_s
        self._clock = clock
        self._known: dict[tuple[str, str], tuple[Allowance, list[int]]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write it; adds how many of its kind were left out before."""
        key = record.name, str(record.msg)
        if key not in self._known:
            if len(self._known) == _MAX_MESSAGES:
                self._known.clear()
            self._known[key] = Allowance(self._per_s, self._clock), [0]
        allowance, left_out = self._known[key]
        if not allowance.take():
            left_out[0] += 1
            return False
        if left_out[0]:
            record.msg = f"{record.getMessage()} ({left_out[0]} more were left out)"
            record.args = ()
            left_out[0] = 0
        return True


class _Text(logging.Formatter):
    """A line of text, with what a record has of :data:`_FIELDS` behind it."""

    def format(self, record: logging.LogRecord) -> str:
        told = {field: getattr(record, field) for field in _FIELDS if hasattr(record, field)}
        return " ".join([super().format(record), *(f"{k}={v}" for k, v in told.items())])


def install(form: Form) -> None:
    """Write what our modules log to standard error from here on; a second call replaces the first.

    On a cluster Ray keeps it with the replica's logs. ``json`` writes an object per line.
    """
    handler = logging.StreamHandler()
    handler.addFilter(RateLimit())
    if form == "json":
        from pythonjsonlogger.json import JsonFormatter

        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter(_TEXT, rename_fields=names))
    else:
        handler.setFormatter(_Text(_TEXT))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        for old in [one for one in logger.handlers if one.name == __name__]:
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    handler.name = __name__

"""Who may come in: the bearer tokens of a file, read again whenever it changes.

One entry per line, ``#`` begins a comment: ``sha256:`` and 64 hex digits, which ``datamix token``
prints, or a token itself. Replace the file as a whole (write another, rename it): one that is
written in place may be seen half-written.

A file without entries lets nobody in. One that is gone or wrong changes nothing: the last good
tokens stay, and the log says so. Neither log nor errors nor reprs ever hold a token or a digest.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import time
from collections.abc import Callable

from datamix.errors import ConfigError, Unauthorized
from datamix.tokens import DIGEST_PREFIX, check_token, content, digest, read_file

# Each request compares with every entry, some 0.2 us for each.
MAX_TOKENS = 1000
_PERIOD_S = 1.0
# File systems count time in steps, of a second at worst: a change right after the file was read may
# leave no trace. So a file that was young when it was read is read again.
_YOUNG_NS = 2_000_000_000

_DIGEST = re.compile(r"[0-9a-fA-F]{64}\Z")

logger = logging.getLogger(__name__)


def parse(text: str) -> frozenset[bytes]:
    """The digests of a file's tokens.

    Raises:
        ConfigError: a line is neither a token nor a digest, or there are too many.
    """
    digests = set()
    for number, line in enumerate(map(content, text.splitlines()), start=1):
        if not line:
            continue
        if line.startswith(DIGEST_PREFIX):
            if not _DIGEST.match(value := line.removeprefix(DIGEST_PREFIX)):
                raise ConfigError(f"line {number}: the digest is none, expected 64 hex digits")
            digests.add(bytes.fromhex(value))
        else:
            try:
                digests.add(digest(check_token(line).encode("ascii")))
            except ConfigError as error:
                raise ConfigError(f"line {number}: {error}") from None
    if len(digests) > MAX_TOKENS:
        raise ConfigError(f"there are {len(digests)} tokens, expected at most {MAX_TOKENS}")
    return frozenset(digests)


class Tokens:
    """The tokens of one file.

    Attributes:
        version: grows with each change of the tokens.
    """

    def __init__(self, path: str, clock: Callable[[], float]) -> None:
        """Read the file.

        Args:
            path: the file; every node of the cluster needs it at the same place.
            clock: seconds.

        Raises:
            ConfigError: it cannot be read, or a line is wrong.
        """
        self._path = path
        self._clock = clock
        self._complaint = ""
        self.version = 0
        self._read_ns = time.time_ns()
        self._signature = self._look()
        self._digests = self._read()
        self._next_s = clock() + _PERIOD_S

    def check(self, authorization: bytes) -> bytes:
        """Find the token of a header ``Authorization: Bearer TOKEN``; return its digest.

        It is compared with every entry, whatever was found before, so that the time which that
        takes tells nothing.

        Raises:
            Unauthorized: it is missing, or none of the file.
        """
        self.refresh()
        scheme, _, token = authorization.strip().partition(b" ")
        given = digest(token.strip())
        known = False
        for entry in self._digests:
            known |= hmac.compare_digest(entry, given)
        if not known or scheme.lower() != b"bearer":
            raise Unauthorized("the bearer token is missing or unknown")
        return given

    def holds(self, entry: bytes) -> bool:
        """Whether the token with this digest, which was let in before, still is in the file."""
        return entry in self._digests

    def refresh(self) -> None:
        """Read the file again if it has changed; looks once a second at most."""
        now = self._clock()
        if now < self._next_s:
            return
        self._next_s = now + _PERIOD_S
        try:
            signature, now_ns = self._look(), time.time_ns()
            if signature == self._signature and signature[0] < self._read_ns - _YOUNG_NS:
                self._complaint = ""
                return
            digests = self._read()
        except ConfigError as error:
            if str(error) != self._complaint:  # once, not every second
                self._complaint = str(error)
                logger.error("the tokens stay as they were: %s", error)
            return
        # Looked at before it was read: what is written meanwhile is read the next time.
        self._signature, self._read_ns = signature, now_ns
        self._complaint = ""
        if digests != self._digests:
            self._digests = digests
            self.version += 1
            logger.info("the tokens were read again, there are %d", len(digests))

    def _look(self) -> tuple[int, int, int]:
        """What tells one file from the next."""
        try:
            found = os.stat(self._path)
        except OSError as error:
            raise ConfigError(
                f"tokens_file: {self._path} cannot be read: {error.strerror}"
            ) from None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read(self) -> frozenset[bytes]:
        try:
            return parse(read_file(self._path))
        except ConfigError as error:
            raise ConfigError(f"tokens_file: {error}") from None

"""Bearer tokens (RFC 6750): what one looks like, how it is drawn, hashed and kept in files.

A device holds the token itself. The cloud needs no more than its SHA-256 digest: tokens are drawn
at random, so that nobody can find one from its digest by guessing.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

from datamix.errors import ConfigError

MIN_CHARACTERS, MAX_CHARACTERS = 16, 512
MAX_FILE_BYTES = 1 << 20
DIGEST_PREFIX = "sha256:"

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*\Z")


def new_token() -> str:
    """Draw a token: 256 bits of the operating system's entropy in 43 characters."""
    return secrets.token_urlsafe(32)


def check_token(token: str) -> str:
    """The token, if it is one; whoever sends it must know that it cannot break out of its header.

    Raises:
        ConfigError: not 16 to 512 characters of ``[A-Za-z0-9._~+/-]`` and perhaps ``=`` at the end.
            What was given instead is not in the message.
    """
    if not (MIN_CHARACTERS <= len(token) <= MAX_CHARACTERS and _TOKEN.match(token)):
        raise ConfigError(
            f"the token is none, expected {MIN_CHARACTERS} to {MAX_CHARACTERS} characters of "
            "A-Z a-z 0-9 . _ ~ + / - and perhaps = at the end"
        )
    return token


def digest(token: bytes) -> bytes:
    """SHA-256, 32 bytes."""
    return hashlib.sha256(token).digest()


def authorization(token: str) -> str:
    """The value of the ``Authorization`` header."""
    return f"Bearer {token}"


def content(line: str) -> str:
    """A line of a file of tokens without its comment, which ``#`` begins."""
    return line.partition("#")[0].strip()


def read_file(path: str | os.PathLike[str]) -> str:
    """The text of a file of tokens.

    Raises:
        ConfigError: it cannot be read, is too large, or is not ASCII.
    """
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise ConfigError(f"{os.fspath(path)} is no file, expected one with tokens")
        with open(path, "rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)} cannot be read: {error.strerror}") from None
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{os.fspath(path)} is larger than {MAX_FILE_BYTES} bytes")
    if not text.isascii():
        raise ConfigError(f"{os.fspath(path)} is not ASCII, expected tokens")
    return text.decode("ascii")


def read_token(path: str | os.PathLike[str]) -> str:
    """A device's token: the only line of its file that is no comment.

    Raises:
        ConfigError: the file cannot be read, or does not hold exactly one token.
    """
    lines = [line for line in map(content, read_file(path).splitlines()) if line]
    if len(lines) != 1:
        raise ConfigError(f"{os.fspath(path)} has {len(lines)} lines with tokens, expected one")
    return check_token(lines[0])


def write_token(path: str | os.PathLike[str]) -> str:
    """Draw a token into a new file that only its owner may read; return the line for the cloud.

    The line is ``sha256:`` and the digest, so the token is shown nowhere.

    Raises:
        ConfigError: the file is there already, or cannot be written.
    """
    token = new_token()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(token + "\n")
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)} cannot be written: {error.strerror}") from None
    return DIGEST_PREFIX + digest(token.encode("ascii")).hex()

"""The limit of open files: devices, HAProxy and the fleet all need more than the usual default."""

from __future__ import annotations

import resource
import sys


def hard_descriptor_limit() -> int:
    """The most files this process may ever open; ``sys.maxsize`` where that is unlimited."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def raise_descriptor_limit() -> int:
    """Raise the limit of open files to the most allowed and return it; children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard_descriptor_limit()

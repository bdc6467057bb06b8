"""What every peer's program does with a message; the server around it is what is compared.

Needs numpy and pyarrow only, so that it imports in the peers' environment.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datamix import wire


def settings(**defaults: int) -> argparse.Namespace:
    """What the command line says: ``port`` at 127.0.0.1, and what differs from ``defaults``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def forward(requests: Sequence[wire.Request]) -> Sequence[wire.Request]:
    """The backbone: none. As our null engine, it hands the batch's rows on as they are."""
    return requests


def encode(request: wire.Request, batch_rows: int) -> bytes:
    """The answer to one request."""
    return wire.encode_response(
        request.features,
        dtype=request.dtype,
        request_id=request.request_id,
        model="echo",
        model_version="1",
        block=request.block,
        queue_s=0,
        compute_s=0,
        batch_rows=batch_rows,
        close_reason="full",
    )

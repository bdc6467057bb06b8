"""Echo on mosec: HTTP and batching in Rust, a Python worker behind a Unix socket."""

from __future__ import annotations

import os
import sys
from typing import Any

from mosec import Server, Worker

from benchmarks.peers import echo
from datamix import wire


class Echo(Worker):
    """Raw bytes in and out: one stage, so nothing is pickled."""

    resp_mime_type = wire.MEDIA_TYPE

    def deserialize(self, data: Any) -> wire.Request:
        """Open one body; mosec calls this in the worker, for each request of a batch."""
        return wire.decode_request(data)

    def forward(self, data: Any) -> Any:
        """One batch."""
        rows = sum(request.rows for request in data)
        return [(request, rows) for request in echo.forward(data)]

    def serialize(self, data: Any) -> bytes:
        """Close one body."""
        return echo.encode(*data)


if __name__ == "__main__":
    # Tried: batches of 16, 32, 64 and 128, 1, 2, 5 and 10 ms: one picture, as the worker is always
    # behind. One tokio thread instead of one per core: 27 instead of 47 us in the Rust process. A
    # second worker: 10% more CPU time a message, sometimes more messages; so it is measured too.
    settings = echo.settings(workers=1, batch=64, wait_ms=1, threads=1)
    os.environ["TOKIO_WORKER_THREADS"] = str(settings.threads)
    sys.argv[1:] = [
        "--address=127.0.0.1",
        f"--port={settings.port}",
        # Not to be in the way: thousands of connections, and large messages.
        "--capacity=16384",
        "--timeout=60000",
        "--max-request-size=16777216",
        "--log-level=warning",
    ]
    server = Server()
    server.append_worker(
        Echo,
        num=settings.workers,
        max_batch_size=settings.batch,
        max_wait_time=settings.wait_ms,
    )
    server.run()

"""The comparison: an echo model on Ray Serve in the way its documentation writes it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from datamix import wire


class Echo:
    """Decodes an Arrow body, batches with ``@serve.batch`` at its defaults, echoes the rows."""

    def __init__(self, a_s: float = 0.0, b_s: float = 0.0) -> None:
        """Echo after ``a_s + b_s * rows`` seconds per batch."""
        self.a_s, self.b_s = a_s, b_s

    @serve.batch
    async def compute(self, requests: list[wire.Request]) -> list[np.ndarray]:
        """One forward over all rows."""
        rows = np.concatenate([r.features for r in requests])
        if self.a_s or self.b_s:
            # As our emulated engine: a sleep that leaves the event loop free.
            await asyncio.to_thread(_sleep, self.a_s + self.b_s * len(rows))
        return np.split(rows, np.cumsum([r.rows for r in requests])[:-1])

    async def __call__(self, http: Request) -> Any:
        """Answer ready checks and inference."""
        if http.method == "GET":
            return JSONResponse({"ready": True})
        request = wire.decode_request(await http.body())
        rows: np.ndarray = await self.compute(request)
        body = wire.encode_response(
            rows,
            dtype=request.dtype,
            request_id=request.request_id,
            model="echo",
            model_version="1",
            block=0,
            queue_s=0,
            compute_s=0,
            batch_rows=len(rows),
            close_reason="full",
        )
        return Response(body, media_type=wire.MEDIA_TYPE)


def _sleep(seconds: float) -> None:
    import time

    time.sleep(seconds)

"""The model that Triton's Python backend runs; triton_app.py puts it where Triton looks for it.

Tensors pass by DLPack: the backend's own conversion reads numpy 2's arrays with strides of 0.
"""

from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from benchmarks.peers import echo
from datamix import wire


class TritonPythonModel:
    """Echo; the name is Triton's."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """One batch: each request is one body, as bytes of shape (1, bytes)."""
        bodies = [
            np.from_dlpack(triton.get_input_tensor_by_name(request, "body")) for request in requests
        ]
        decoded = echo.forward([wire.decode_request(body.data.cast("B")) for body in bodies])
        rows = sum(request.rows for request in decoded)
        return [triton.InferenceResponse([answer(request, rows)]) for request in decoded]


def answer(request: wire.Request, rows: int) -> Any:
    """One body to send; a bytearray, since DLPack refuses what is read-only."""
    body = np.frombuffer(bytearray(echo.encode(request, rows)), np.uint8)
    return triton.Tensor.from_dlpack("answer", body.reshape(1, -1))

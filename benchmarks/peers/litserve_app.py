"""Echo on LitServe: FastAPI in front, a worker process behind queues, its ZeroMQ transport."""

from typing import Annotated, Any

import litserve
from fastapi import Body, Response

from benchmarks.peers import echo
from datamix import wire

# LitServe reads a request as JSON or a form unless its annotation says otherwise, and FastAPI hands
# a body of bytes on as it is. (Annotations are read at run time, so none of them is postponed.)
Raw = Annotated[bytes, Body(media_type=wire.MEDIA_TYPE)]


class Echo(litserve.LitAPI):
    """Raw bytes in and out."""

    def setup(self, device: str) -> None:
        """No model to load."""

    def decode_request(self, request: Raw) -> wire.Request:
        """Open one body; LitServe calls this in the worker."""
        return wire.decode_request(request)

    def batch(self, inputs: list[wire.Request]) -> list[wire.Request]:
        """Leave the requests as they are: there is nothing to stack for."""
        return inputs

    def predict(self, x: Any) -> Any:
        """One batch."""
        rows = sum(request.rows for request in x)
        return [(request, rows) for request in echo.forward(x)]

    def unbatch(self, output: Any) -> Any:
        """One output per request already."""
        return output

    def encode_response(self, output: tuple[wire.Request, int]) -> Response:
        """Close one body."""
        return Response(echo.encode(*output), media_type=wire.MEDIA_TYPE)


if __name__ == "__main__":
    # Tried: batches of 16, 64 and 128, 1, 5 and 20 ms: little difference; whatever the batch, each
    # request goes through a queue in a process of its own (multiprocessing.Manager). A second
    # front: half as many messages more. A second worker, or no ZeroMQ on the way back: more CPU
    # time. (With no time-out at all the worker spins.)
    settings = echo.settings(batch=64, wait_ms=5, workers=1, fronts=2, zmq=1)
    server = litserve.LitServer(
        Echo(max_batch_size=settings.batch, batch_timeout=settings.wait_ms / 1000),
        accelerator="cpu",
        workers_per_device=settings.workers,
        timeout=60,
        fast_queue=bool(settings.zmq),
    )
    server.run(
        host="127.0.0.1",
        port=settings.port,
        num_api_servers=settings.fronts,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )

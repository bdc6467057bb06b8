"""Echo on BentoML with adaptive batching: its dispatcher and the service share one process."""

import json
import os
import sys
from typing import Any

import bentoml
from _bentoml_sdk.io_models import IORootModel
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.peers import echo
from datamix import wire

# BentoML imports this module again in each of its processes, so the settings go by the environment.
VARIABLE = "DATAMIX_BENCHMARK_BENTOML"
# Tried: batches of 16, 64 and 256: one picture. A second worker: a quarter more messages, less CPU
# time. A latency goal of 1 s: no difference; of 100 ms: the dispatcher sheds with 503. Metrics:
# some 10% more CPU time.
SETTINGS = json.loads(os.environ.get(VARIABLE, "{}")) or {
    "batch": 64,
    "latency_ms": 60_000,
    "workers": 2,
    "metrics": 0,
}


class Input(IORootModel[list[Any]]):
    """A body as it comes: a batch of one.

    BentoML would read bytes through a JSON schema that it builds anew for each request.
    """

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> Any:
        """Open one body."""
        return cls.model_construct(root=[wire.decode_request(await request.body())])


Input.__root_input__ = True


class Output(IORootModel[list[Any]]):
    """A body as it goes."""

    @classmethod
    async def to_http_response(cls, obj: Any, serde: Any) -> Response:
        """Close one body."""
        return Response(echo.encode(*obj[0]), media_type=wire.MEDIA_TYPE)


@bentoml.service(
    workers=SETTINGS["workers"],
    # Seconds, and requests at once, not to be in the way.
    traffic={"timeout": 60, "max_concurrency": 16384},
    logging={"access": {"enabled": False}},
    metrics={"enabled": bool(SETTINGS["metrics"])},
)
class Echo:
    """The service."""

    @bentoml.api(
        batchable=True,
        max_batch_size=SETTINGS["batch"],
        max_latency_ms=SETTINGS["latency_ms"],
        input_spec=Input,
        output_spec=Output,
    )
    async def infer(self, requests: list[Any]) -> list[Any]:
        """One batch; ``async``, so that no thread is woken for it."""
        rows = sum(request.rows for request in requests)
        return [(request, rows) for request in echo.forward(requests)]


if __name__ == "__main__":
    settings = vars(echo.settings(**SETTINGS))
    port = settings.pop("port")
    # Nobody is told that we measure, and nothing is written outside of this folder.
    os.environ.update(
        {VARIABLE: json.dumps(settings), "BENTOML_DO_NOT_TRACK": "1", "BENTOML_HOME": os.getcwd()}
    )
    command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.peers.bentoml_app:Echo"]
    os.execv(sys.executable, [*command, "--host=127.0.0.1", f"--port={port}"])

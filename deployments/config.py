"""What one application needs to know; `deployments/serve.yaml` and `serve run key=value` set it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from datamix.errors import ConfigError
from deployments.engine import check_device, parse_engine


class Config(BaseModel):
    """Settings of the backbone's application; unknown keys are refused.

    Attributes:
        bundle: folder or URI of the bundle, or several of them; only manifest and backbone weights
            are read. The first bundle of a model is its current version, until `datamix models`
            says otherwise.
        engine: ``torch``, ``null``, or ``emulated:a_s,b_s`` which sleeps a + b * rows seconds per
            batch, or ``emulated:PATH.json`` which sleeps as long as the profile says.
        echo_shape: row shape that a null or emulated engine echoes where there is no bundle.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: what the engine computes in. ``float16`` on CUDA only, ``bfloat16`` where the
            hardware has it, ``auto`` is bfloat16 there and float32 elsewhere. Bundles promise their
            tolerance for float32.
        channels_last: memory format of batches and weights; ``auto`` is what was measured best.
        optimise: ``fuse`` folds norms into convolutions, ``none`` runs the modules as they are.
        graphs: on CUDA, record a graph per block and batch size and pad batches to the next size.
        threads: CPU threads of one forward; None for all cores this process may use (affinity,
            control group, ``OMP_NUM_THREADS``).
        max_batch_rows: rows in a batch at most.
        max_queue_rows: rows waiting at most; beyond it requests are shed with 429.
        max_queue_bytes: bytes of the rows waiting at most; beyond it, too, requests are shed.
        target_batch_s: seconds a batch should take at most: once the batcher has learned what rows
            cost, batches get no more than that allows, but always one request. Leave room for many
            rows, or much of the time goes into the fixed cost of each batch. None: no target.
        max_request_bytes: bytes of a message at most, as received and inflated.
        max_request_rows: rows of a message at most.
        max_stream_requests: requests of one stream in flight at most; then reading stops.
        stream_idle_timeout_s: a stream without a message either way for so long is closed; None:
            never.
        slow_reader_timeout_s: a stream whose peer has read nothing for so long, while answers wait
            for it, is cut off.
        max_stream_buffer_bytes: answers that may wait in this process for one peer to read them;
            beyond it is cut off at once. A peer that reads slowly is not read from, so that without
            this bound they were at most ``max_stream_requests`` answers.
        rotate_streams_within_s: when a replica has started, all of them let go of their streams
            within so many seconds, sooner where HAProxy would cut them sooner, and devices connect
            anew where there are fewest; None: never.
        tokens_file: file of the bearer tokens that are let in (docs/security.md), at the same place
            on every node; None lets everybody in.
        operator: who runs this application, as it tells in ``GET /v2``: a device that hides its
            inputs between two operators refuses one without a name, and two of the same. Its
            engine must be exact enough to take noise off its answers: ``auto`` is float32 then, and
            a dtype beyond a bundle's tolerance is refused.
        trace_endpoint: where a collector takes OTLP over HTTP, ``http://host:4318/v1/traces``:
            spans of the requests that devices trace go there (docs/tracing.md). None: no traces.
        logs: ``text``, or ``json`` for an object per line; with ids of requests.
        traces_per_s: requests traced per second and replica, at most.
        health_timeout_s: how long the engine may take to answer a health probe, what is under way
            included; then the replica ends itself, and Serve starts another.
        canary_slowdown: a version that is loaded beside the current one of its model is refused
            where its batches take more than so many times as long; None: however slow it is.
        canary_batch_s: seconds that full batches, one for every block, may take before a version is
            served; None: as long as they like.
        release: any text, told in ``GET /v2``. Serve replaces replicas where the configuration
            changes; code that was changed in place is no change of it, but another release is.
        price_per_hour: what a replica costs in an hour, in any currency, with its share of the
            machine; cost per 1,000 inferences is made from it (docs/monitoring.md). None: unknown.
        power_watts: what a replica draws with its share of the machine, where no GPU measures it;
            likewise for joules.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str | tuple[str, ...] | None = None
    engine: str = "torch"
    echo_shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    channels_last: bool | Literal["auto"] = "auto"
    optimise: Literal["none", "fuse"] = "fuse"
    graphs: bool = True
    threads: int | None = Field(default=None, ge=1)
    max_batch_rows: int = Field(default=256, ge=1)
    max_queue_rows: int = Field(default=8192, ge=1)
    max_queue_bytes: int = Field(default=512 << 20, ge=1)
    target_batch_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_request_bytes: int = Field(default=8 << 20, ge=1024, le=16 << 20)
    max_request_rows: int = Field(default=128, ge=1)
    max_stream_requests: int = Field(default=128, ge=1)
    stream_idle_timeout_s: float | None = Field(default=600.0, gt=0, allow_inf_nan=False)
    slow_reader_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    max_stream_buffer_bytes: int = Field(default=64 << 20, ge=1 << 16)
    rotate_streams_within_s: float | None = Field(default=60.0, gt=0, allow_inf_nan=False)
    tokens_file: str | None = Field(default=None, min_length=1)
    operator: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$")
    trace_endpoint: str | None = Field(default=None, min_length=1)
    logs: Literal["text", "json"] = "text"
    traces_per_s: float = Field(default=100.0, ge=1, allow_inf_nan=False)
    health_timeout_s: float = Field(default=8.0, gt=0, allow_inf_nan=False)
    canary_slowdown: float | None = Field(default=3.0, ge=1, allow_inf_nan=False)
    canary_batch_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    release: str = Field(default="", pattern=r"^[A-Za-z0-9._+-]{0,64}$")
    price_per_hour: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    power_watts: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @property
    def bundles(self) -> tuple[str, ...]:
        """The bundles as a tuple, empty where there is none."""
        if isinstance(self.bundle, str):
            return (self.bundle,)
        return self.bundle or ()

    @model_validator(mode="after")
    def _agree(self) -> Config:
        try:
            kind = parse_engine(self.engine).kind
            check_device(self.device)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if self.dtype == "float16" and self.device == "cpu":
            raise ValueError("dtype is 'float16', expected another one on the processor")
        if not self.bundles and (kind == "torch" or self.echo_shape is None):
            raise ValueError(
                "no bundle is given; only a null or emulated engine with echo_shape can do without"
            )
        if self.max_request_rows > self.max_batch_rows:
            raise ValueError(
                f"max_request_rows is {self.max_request_rows}, expected at most max_batch_rows "
                f"({self.max_batch_rows}), as a request never splits"
            )
        if self.max_request_rows > self.max_queue_rows:
            raise ValueError(
                f"max_request_rows is {self.max_request_rows}, expected at most max_queue_rows "
                f"({self.max_queue_rows}), or the largest requests would be shed for ever"
            )
        # Twice: a number of one digit and its comma become four bytes.
        if 2 * self.max_request_bytes > self.max_queue_bytes:
            raise ValueError(
                f"max_queue_bytes is {self.max_queue_bytes}, expected at least twice "
                f"max_request_bytes ({self.max_request_bytes}), or the largest requests would be "
                "shed for ever"
            )
        return self

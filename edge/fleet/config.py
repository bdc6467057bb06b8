"""What to simulate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from datamix.errors import ConfigError
from edge.access import Access

WORKLOADS = ("bundle", "echo")


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """One run of the fleet. Times are in seconds, rates per second over the whole fleet.

    Attributes:
        url: base URL of the cloud, ``http(s)://host:port``.
        doors: base URLs of more front doors of the same cloud, such as HAProxy on other nodes; the
            devices are spread over all of them in turn.
        bundle: the bundle whose stem, bridges and head the devices run; its backbone is read too
            where answers are verified. Needed for ``workload="bundle"``.
        inputs: ``.npz`` file with ``labels`` (n,) and ``images`` (n, C, H, W) uint8 or ``pcm``
            (n, samples) int16, as the bundle takes; None for the sample that ships and fits.
        devices: simulated devices, each with a stream of its own.
        rate: inferences per second; each is one group, so ``group_size`` inputs.
        duration_s: for how long inferences fall due.
        seed: the same seed gives the same schedule on any number of processes.
        processes: how many processes hold the devices.
        pacer: ``poisson`` or ``constant``.
        workload: ``bundle`` infers real inputs; ``echo`` sends noise and expects it back.
        verify: compare every answer with the locally computed one.
        timeout_s: an inference has failed this long after it was due.
        max_retries: how often one inference sends a message again.
        retry_ratio: the whole fleet's retries per first send, above a floor of 100 per process.
        connect_at_once: how many devices open their stream at the same time.
        connect_timeout_s: by when every device has its stream, or the run does not start.
        model: the model's name; None for the bundle's, or the one that the cloud says it serves.
        precompute: groups that are mixed and encoded once, before the run, and sent in turn; 0 for
            fresh mixtures in every message, as devices send them. For the bundle workload.
        rows: rows per message of the echo workload; the bundle workload has ``group_size`` rows.
        token: bearer token, where the cloud wants one; not in the repr.
        ca_file: PEM file of the authorities that may vouch for an ``https`` cloud; None for those
            that this machine trusts.
    """

    url: str
    bundle: str | None = None
    inputs: str | None = None
    devices: int = 100
    rate: float = 50.0
    duration_s: float = 20.0
    seed: int = 0
    processes: int = 1
    pacer: str = "poisson"
    workload: Literal["bundle", "echo"] = "bundle"
    verify: bool = True
    timeout_s: float = 10.0
    max_retries: int = 5
    retry_ratio: float = 0.2
    connect_at_once: int = 200
    connect_timeout_s: float = 60.0
    model: str | None = None
    rows: int = 4
    precompute: int = 0
    token: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    doors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse settings that cannot mean anything."""
        for url in (self.url, *self.doors):
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"url is {url!r}, expected http://host:port or https://host:port")
            if url.split(":")[0] != self.url.split(":")[0]:
                raise ConfigError(f"url is {url!r}, expected the scheme of {self.url!r}")
        if self.workload not in WORKLOADS:
            raise ConfigError(f"workload is {self.workload!r}, expected one of {WORKLOADS}")
        if self.workload == "bundle" and self.bundle is None:
            raise ConfigError("the bundle workload got no bundle, expected a path")
        for name in ("devices", "processes", "connect_at_once", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("rate", "duration_s", "timeout_s", "connect_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a positive number")
        if self.precompute < 0 or (self.precompute and self.workload != "bundle"):
            raise ConfigError(
                f"precompute is {self.precompute} with the workload {self.workload!r},"
                " expected 0, or more with 'bundle'"
            )
        if self.max_retries < 0 or self.retry_ratio < 0:
            raise ConfigError("max_retries and retry_ratio are 0 or more")
        self.access.context(self.url)

    @property
    def access(self) -> Access:
        """How the devices get in."""
        return Access(self.token, self.ca_file)

    @property
    def base_url(self) -> str:
        """The URL without a slash at its end."""
        return self.url.rstrip("/")

    @property
    def base_urls(self) -> tuple[str, ...]:
        """All front doors, without slashes at their ends."""
        return tuple(url.rstrip("/") for url in (self.url, *self.doors))

    def stream_url(self, model: str, device: int = 0) -> str:
        """Where a device opens its stream."""
        doors = self.base_urls
        door = doors[device % len(doors)]
        return f"ws{door.removeprefix('http')}/v2/models/{model}/stream"

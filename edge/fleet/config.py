"""What to simulate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from datamix.errors import ConfigError
from edge.access import Access
from edge.fleet import arrivals, pacing
from edge.fleet.behaviour import Cancellations, Churn, SlowReaders, Storm
from edge.fleet.profiles import Profile

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
        rate: inferences per second; each is one group, so ``group_size`` inputs. A trace and a
            closed loop have rates of their own, and do not read it.
        duration_s: for how long inferences fall due.
        seed: the same seed gives the same schedule on any number of processes.
        processes: how many processes hold the devices.
        pacer: the law of arrivals: ``poisson``, ``constant``, ``gamma:shape=0.25``, ... or
            ``closed:think_s=1``; see :mod:`edge.fleet.arrivals`.
        workload: ``bundle`` infers real inputs; ``echo`` sends noise and expects it back.
        verify: compare every answer with the locally computed one.
        timeout_s: an inference has failed this long after it was due.
        attempt_timeout_s: a stream on which a message has waited this long for its answer, and
            nothing else came lately either, is taken for dead: another is opened.
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
        mode: what leaves the devices; None for the mode that the bundle was made for.
        second: in the mode split, operator B's base URL; ``url`` is operator A's.
        second_token: bearer token for that one; not in the repr.
        allow_same_operator: in the mode split, go on where both ends seem to have one operator,
            which is not private, and marked so wherever a result is shown.
        masks_ahead: in the mode split, for how many groups a process keeps masks ready.
        profiles: the kinds of devices and links, with shares that add up to 1; none for devices as
            fast as the generator, on this machine's own link.
        churn: devices come and go; None for devices that stay.
        storms: moments at which devices lose their stream and come back at once.
        slow_readers: devices that let answers pile up; None for none.
        cancel: inferences that devices give up of their own accord; None for none.
        warm_up_s: inferences due before it are in no latency figure; they count everywhere else.
        slo_s: the latency from the schedule up to which a right answer is of use; None for any.
        out: new folder for the run's record, written as it goes; None for none.
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
    attempt_timeout_s: float = 10.0
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
    mode: str | None = None
    second: str | None = None
    second_token: str | None = field(default=None, repr=False)
    allow_same_operator: bool = False
    masks_ahead: int = 64
    profiles: tuple[Profile, ...] = ()
    churn: Churn | None = None
    storms: tuple[Storm, ...] = ()
    slow_readers: SlowReaders | None = None
    cancel: Cancellations | None = None
    warm_up_s: float = 0.0
    slo_s: float | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot mean anything."""
        second = () if self.second is None else (self.second,)
        for url in (self.url, *self.doors, *second):
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"url is {url!r}, expected http://host:port or https://host:port")
        for url in self.doors:
            if url.split(":")[0] != self.url.split(":")[0]:
                raise ConfigError(f"url is {url!r}, expected the scheme of {self.url!r}")
        if self.workload not in WORKLOADS:
            raise ConfigError(f"workload is {self.workload!r}, expected one of {WORKLOADS}")
        if self.workload == "bundle" and self.bundle is None:
            raise ConfigError("the bundle workload got no bundle, expected a path")
        for name in ("devices", "processes", "connect_at_once", "rows", "masks_ahead"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("rate", "duration_s", "timeout_s", "attempt_timeout_s", "connect_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a positive number")
        if self.precompute < 0 or (self.precompute and self.workload != "bundle"):
            raise ConfigError(
                f"precompute is {self.precompute} with the workload {self.workload!r},"
                " expected 0, or more with 'bundle'"
            )
        if self.max_retries < 0 or self.retry_ratio < 0:
            raise ConfigError("max_retries and retry_ratio are 0 or more")
        if self.workload == "echo" and (self.mode is not None or self.second is not None):
            raise ConfigError("the echo workload got a mode or a second end, expected neither")
        late = [storm.at_s for storm in self.storms if storm.at_s >= self.duration_s]
        if late:
            raise ConfigError(
                f"a storm is at {late[0]:g} s, expected before the end, {self.duration_s:g} s"
            )
        if self.profiles and abs(sum(profile.share for profile in self.profiles) - 1) > 1e-6:
            raise ConfigError("the profiles' shares don't add up to 1, expected that they do")
        arrivals.parse(self.pacer)
        if not 0 <= self.warm_up_s < self.duration_s:
            raise ConfigError(
                f"warm_up_s is {self.warm_up_s}, expected at least 0 and less than duration_s, "
                f"{self.duration_s}"
            )
        if self.slo_s is not None and not 0 < self.slo_s < float("inf"):
            raise ConfigError(f"slo_s is {self.slo_s}, expected a positive number")
        self.access.context(self.url)
        if self.second is not None:
            self.second_access.context(self.second)

    @property
    def loop(self) -> Literal["open", "closed"]:
        """Whether answers have a say in when the next inference is due."""
        return "closed" if isinstance(arrivals.parse(self.pacer), arrivals.Closed) else "open"

    def schedule(self) -> pacing.Schedule:
        """Make the whole fleet's schedule.

        Raises:
            ConfigError: settings that make none, such as a trace that can't be read.
        """
        return pacing.schedule(
            self.pacer, self.rate, self.duration_s, self.devices, self.seed, self.churn
        )

    @property
    def access(self) -> Access:
        """How the devices get in."""
        return Access(self.token, self.ca_file)

    @property
    def second_access(self) -> Access:
        """The same for operator B."""
        return Access(self.second_token, self.ca_file)

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

"""What do devices see of a failure in the cloud, and for how long?

Two replicas of the shipped bundle on one machine, under a fleet whose every answer is verified;
then something is killed, hangs, is cut or raises. A late answer took more than a second.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from benchmarks import report
from benchmarks.operated import BUNDLE, Fleet, Operated, Seen, kill, operated, until

REPLICAS = 2
CUT_S = 10.0


@dataclass(frozen=True)
class Scene:
    """What a failure happens to.

    Attributes:
        cluster: the cluster.
        faults: where files switch an engine's faults (tests/faulty.py).
        cut: cuts the devices' line to the cloud, or mends it.
        door: what the devices know as the cloud: the end of that line.
        args: the application's settings.
    """

    cluster: Operated
    faults: Path
    cut: Callable[[bool], None]
    door: str
    args: dict[str, Any]

    def deploy(self, **changes: Any) -> None:
        """Deploy with these settings changed, and wait.

        Raises:
            Unavailable: it failed, and why.
        """
        self.cluster.deploy(
            self.args | changes,
            replicas=REPLICAS,
            import_path="tests.faulty:app",
            environment={"FAULTS": str(self.faults)},
        )


@dataclass(frozen=True)
class Struck:
    """A failure that was made.

    Attributes:
        at_s: when, on the monotonic clock.
        back_s: seconds until what failed was there again; None where nothing had gone.
        excused: inferences that nobody could have answered.
    """

    at_s: float
    back_s: float | None = None
    excused: int = 0


def kill_replica(scene: Scene) -> Struck:
    """kill -9 of one of the replicas."""
    cluster, before = scene.cluster, scene.cluster.running()
    at_s = kill(cluster.processes("ServeReplica")[0])
    return Struck(at_s, _until_replaced(cluster, before, at_s))


def kill_haproxy(scene: Scene) -> Struck:
    """kill -9 of HAProxy, and so of every stream."""
    cluster = scene.cluster
    old = cluster.processes("haproxy")
    at_s = [kill(process) for process in old][-1]

    def again() -> bool:
        new = {process.pid for process in cluster.processes("haproxy")}
        return bool(new - {process.pid for process in old}) and _answers(cluster.url)

    return Struck(at_s, until(again))


def kill_controller(scene: Scene) -> Struck:
    """kill -9 of the Serve controller."""
    cluster = scene.cluster
    (old,) = cluster.processes("ServeController")
    at_s = kill(old)

    def again() -> bool:
        new = [process.pid for process in cluster.processes("ServeController")]
        return new not in ([], [old.pid]) and len(cluster.running()) == REPLICAS

    return Struck(at_s, until(again))


def hang_engine(scene: Scene) -> Struck:
    """An engine that never comes back from a batch."""
    before = scene.cluster.running()
    (scene.faults / "hang").touch()
    until(lambda: not (scene.faults / "hang").exists())
    at_s = time.monotonic()
    return Struck(at_s, _until_replaced(scene.cluster, before, at_s))


def poison_engine(scene: Scene) -> Struck:
    """An engine that raises on one input, whichever batch it is in."""
    (scene.faults / "poison").touch()
    until(lambda: (scene.faults / "poisoned").exists())
    return Struck(time.monotonic(), None, excused=1)


def cut_devices(scene: Scene) -> Struck:
    """Nothing passes between devices and cloud for a while, and no connection is closed."""
    at_s = time.monotonic()
    scene.cut(True)
    time.sleep(CUT_S)
    scene.cut(False)
    return Struck(at_s, time.monotonic() - at_s)


FAILURES: dict[str, Callable[[Scene], Struck]] = {
    "kill -9 of a replica": kill_replica,
    "kill -9 of HAProxy": kill_haproxy,
    "kill -9 of the Serve controller": kill_controller,
    "an engine hangs": hang_engine,
    "an engine raises on one input": poison_engine,
    "10 s without network between devices and cloud": cut_devices,
}


def _until_replaced(cluster: Operated, before: set[str], at_s: float) -> float:
    """Wait until all replicas run again, one of them new; seconds since ``at_s``."""

    def replaced() -> bool:
        now = cluster.running()
        return len(now) == REPLICAS and len(now - before) == 1

    until(replaced)
    return time.monotonic() - at_s


def _answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/v2/health/ready", timeout=1) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


@contextlib.contextmanager
def scene(**args: Any) -> Iterator[Scene]:
    """A cluster with the shipped bundle and engines that can be told to fail."""
    from tests.relay import relay

    with contextlib.ExitStack() as stack:
        faults = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dmx-faults-")))
        cluster = stack.enter_context(operated(REPLICAS))
        line = stack.enter_context(relay(int(cluster.url.rpartition(":")[2])))
        settings = {"bundle": str(BUNDLE), "threads": 1, **args}
        scene = Scene(cluster, faults, line.cut, f"http://127.0.0.1:{line.port}", settings)
        scene.deploy()
        yield scene


def strike(scene: Scene, name: str, **settings: Any) -> tuple[Seen, Struck]:
    """Let one failure happen under load; what the devices saw, and what was done."""
    fleet = Fleet(scene.door, **settings)
    fleet.wait_running()
    struck = FAILURES[name](scene)
    seen = fleet.seen()
    with contextlib.suppress(FileNotFoundError):
        (scene.faults / "poisoned").unlink()
    return seen, struck


def row(name: str, seen: Seen, struck: Struck) -> dict[str, Any]:
    """One row of the table."""
    return {
        "failure": name,
        "requests": seen.summary.requests,
        "wrong": seen.summary.wrong + seen.strays,
        "lost": seen.lost - struck.excused,
        "retried": seen.summary.retries,
        "recovery_s": round(seen.recovery_s(struck.at_s), 2),
        "back_s": "" if struck.back_s is None else round(struck.back_s, 2),
    }


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--rate", type=float, default=40.0, help="inferences per second")
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=40.0, help="of load for each failure")
    parser.add_argument("--only", action="append", choices=FAILURES, help="only these failures")
    options = parser.parse_args()
    rows = []
    with scene() as stage:
        for name in options.only or FAILURES:
            seen, struck = strike(
                stage,
                name,
                rate=options.rate,
                devices=options.devices,
                duration_s=options.seconds,
            )
            rows.append(row(name, seen, struck))
            print(rows[-1], seen.summary.failed, flush=True)
    report.show(
        f"{REPLICAS} replicas of fashion-mnist-mix on one machine, {options.devices} devices, "
        f"{options.rate:g} inferences per second of 2 requests each",
        rows,
        [
            "wrong: answers with other values than the local ones, for somebody else, or twice",
            "lost: inferences without an answer within 30 s and the fleet's retry budget; the one "
            "input that the engine raises on is not counted, as nobody could answer it",
            "recovery_s: from the failure to the last answer that took more than a second",
            "back_s: until what failed was there again, by Serve's account",
        ],
        options.json,
        requests=float(sum(each["requests"] for each in rows)),
        wrong=float(sum(each["wrong"] for each in rows)),
        lost=float(sum(each["lost"] for each in rows)),
        replica_back_s=max(
            (float(each["back_s"]) for each in rows if "replica" in each["failure"]), default=0.0
        ),
    )


if __name__ == "__main__":
    main()

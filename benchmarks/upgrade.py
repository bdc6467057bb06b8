"""Does an upgrade cost a device anything, and is a bad version kept out?

Two replicas under three loads: a fleet whose devices have version 1, one whose devices have version
2, both verified answer by answer, and clients that name no version (benchmarks/followers.py).
Meanwhile versions are loaded, promoted and rolled back, code and configuration are deployed anew,
and bad ones are tried.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

from benchmarks import report
from benchmarks.followers import Followers, pools
from benchmarks.operated import BUNDLE, ROOT, Fleet, Operated, Seen, operated, until
from datamix.bundle import BACKBONE, MANIFEST, add_canaries, read_manifest
from datamix.canaries import CANARIES
from datamix.errors import Unavailable
from edge.fleet import result

MODEL = "fashion-mnist-mix"
REPLICAS = 2
_SETTLE_S = 5.0  # after a step, so that what it did shows in its row


@dataclass(frozen=True)
class Bundles:
    """Versions of one model: two good ones, and three bad ones."""

    one: Path
    two: Path
    wrong: Path
    broken: Path
    slow: Path


@dataclass(frozen=True)
class Step:
    """One thing that was done to the cluster.

    Attributes:
        name: what.
        from_s: when it began, on the monotonic clock.
        to_s: when its row ends.
        seconds: how long it took.
        outcome: ``done``, or why it was refused.
    """

    name: str
    from_s: float
    to_s: float
    seconds: float
    outcome: str


def make_bundles(folder: Path) -> Bundles:
    """The versions."""
    import torch
    from safetensors.torch import load, save

    from datamix.bundle import save_bundle
    from datamix.models import Architecture, build

    made = Bundles(*(folder / name for name in ("1", "2", "wrong", "broken", "slow")))
    shutil.copytree(BUNDLE, made.one)
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=generator))
        if tensor.is_floating_point() and tensor.ndim > 1
        else tensor
        for name, tensor in load((BUNDLE / BACKBONE).read_bytes()).items()
    }
    for path, version in ((made.two, "2"), (made.wrong, "wrong"), (made.broken, "broken")):
        shutil.copytree(BUNDLE, path)
        (path / BACKBONE).write_bytes(save(weights))
        _edit(path, version)
    add_canaries(made.two)
    # Weights of version 2 with what version 1 makes of the canaries.
    (made.wrong / CANARIES).write_bytes((BUNDLE / CANARIES).read_bytes())
    _edit(made.wrong, "wrong", CANARIES)
    # Half a download.
    (made.broken / BACKBONE).write_bytes((made.two / BACKBONE).read_bytes()[:300_000])
    manifest = read_manifest(BUNDLE)
    options: dict[str, int | str] = {"n_blocks": 2, "width": 384}
    torch.manual_seed(0)
    save_bundle(
        made.slow,
        build(Architecture("convnet", options)).eval(),
        name=MODEL,
        version="slow",
        mode="mix",
        group_size=manifest.group_size,
        architecture=manifest.architecture.model_copy(update={"options": options}),
        preprocessing=manifest.preprocessing,
        class_names=manifest.class_names,
        tolerance=manifest.tolerance,
        metrics={},
    )
    return made


def _edit(path: Path, version: str, *files: str) -> None:
    """Give a bundle a version, and the hashes of its weights and of these files."""
    manifest = json.loads((path / MANIFEST).read_text())
    hashes = manifest["hashes"]
    if CANARIES not in files:
        hashes.pop(CANARIES, None)
        (path / CANARIES).unlink(missing_ok=True)
    for file in (BACKBONE, *files):
        hashes[file] = hashlib.sha256((path / file).read_bytes()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest | {"version": version}, indent=2))


def make_code(folder: Path, edit: Callable[[str], str]) -> Path:
    """A copy of the cloud's code with one file changed."""
    for package in ("datamix", "deployments"):
        shutil.copytree(ROOT / package, folder / package)
    file = folder / "deployments" / "backbone.py"
    before = file.read_text()
    file.write_text(edit(before))
    if file.read_text() == before:
        raise ValueError("the code is as it was, expected a change")
    return folder


class Upgrades:
    """The steps, one after the other."""

    def __init__(self, cluster: Operated, bundles: Bundles, folder: Path) -> None:
        """Act on a cluster that serves ``bundles.one``."""
        self.cluster = cluster
        self.bundles = bundles
        self.steps: list[Step] = []
        self._folder = folder
        self._args: dict[str, Any] = {"bundle": str(bundles.one), "threads": 1}
        self._code: Path | None = None

    def step(self, name: str, work: Callable[[], str]) -> None:
        """Do one thing; ``work`` returns its outcome."""
        from_s = time.monotonic()
        outcome = work().replace(f"{self._folder}/", "").removeprefix("datamix: ")
        seconds = time.monotonic() - from_s
        time.sleep(_SETTLE_S)
        self.steps.append(Step(name, from_s, time.monotonic(), seconds, outcome))
        print(f"{name}: {seconds:.1f} s, {outcome}", flush=True)

    def models(self, *words: str) -> str:
        """`datamix models`, as an operator types it; ``done``, or why it was refused."""
        command = [sys.executable, "-m", "cluster.cli", "models", *words]
        done = subprocess.run(
            [*command, "--address", self.cluster.address],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return "done" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    def deploy(self, code: Path | None = None, **changes: Any) -> str:
        """`datamix deploy` of other settings or code; ``done``, or why it was refused."""
        args = self._args | changes
        path = code or self._code
        environment = {} if path is None else {"PYTHONPATH": str(path)}
        try:
            self.cluster.deploy(args, replicas=REPLICAS, environment=environment, within_s=300)
        except Unavailable as error:
            return str(error)
        self._args, self._code = args, path
        return "done"

    def server_names(self) -> set[str]:
        """What the replicas call themselves, by several new connections."""
        names = set()
        for _ in range(20):
            with urlopen(f"{self.cluster.url}/v2", timeout=10) as answer:
                names.add(json.load(answer)["name"])
        return names

    def all(self) -> None:
        """Every step."""
        bundles, folder = self.bundles, self._folder
        self.step("promote version 2", lambda: self.models("promote", MODEL, "2"))
        self.step("roll back to version 1", lambda: self.models("rollback", MODEL))
        self.step("promote version 2 again", lambda: self.models("promote", MODEL, "2"))
        for name in ("broken", "wrong", "slow"):
            path = str(getattr(bundles, name))
            self.step(f"load a version that is {name}", partial(self.models, "load", path))

        def other_code() -> str:
            code = make_code(
                folder / "code", lambda text: text.replace('"name": "datamix"', '"name": "newer"')
            )
            outcome = self.deploy(code)
            until(lambda: self.server_names() == {"newer"})
            return outcome

        self.step("deploy other code", other_code)
        self.step("deploy other settings", lambda: self.deploy(max_batch_rows=128, release="2"))
        self.step("deploy a bundle that is wrong", lambda: self.deploy(bundle=str(bundles.wrong)))
        self.step("deploy a bundle that is broken", lambda: self.deploy(bundle=str(bundles.broken)))
        self.step("deploy too low a limit of time", lambda: self.deploy(canary_batch_s=1e-6))
        spoilt = make_code(folder / "spoilt", lambda text: text + "\nthis is no Python\n")
        self.step("deploy code that does not import", lambda: self.deploy(spoilt))


def rows(steps: list[Step], fleets: list[Seen], followers: Followers) -> list[dict[str, Any]]:
    """One row per step, of what all three loads saw in its time."""
    found = []
    for step in steps:
        requests = failed = wrong = 0
        for seen in fleets:
            table = seen.run.table
            done_s = table["done_s"] + seen.run.start_s
            ended = table[(done_s >= step.from_s) & (done_s < step.to_s)]
            status = ended["status"]
            requests += int(ended["rounds"].sum())
            wrong += int((status == result.WRONG).sum())
            good = (result.OK, result.WRONG, result.STOPPED)
            failed += int((~np.isin(status, good)).sum())
        counts = followers.counts(step.from_s, step.to_s)
        found.append(
            {
                "step": step.name,
                "seconds": round(step.seconds, 1),
                "requests": requests + counts.total(),
                "failed": failed + counts["failed"],
                "wrong": wrong + counts["wrong"],
                "mixed-version": counts["mixed"],
                "outcome": step.outcome,
            }
        )
    return found


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--rate", type=float, default=20.0, help="inferences per second, a fleet")
    parser.add_argument("--devices", type=int, default=50, help="of each fleet")
    parser.add_argument("--requests", type=int, default=20_000, help="go on until so many")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dmx-upgrade-") as name:
        folder = Path(name)
        bundles = make_bundles(folder)
        with operated(REPLICAS) as cluster:
            upgrades = Upgrades(cluster, bundles, folder)
            print(upgrades.deploy(), upgrades.models("load", str(bundles.two)), flush=True)
            followers = Followers(cluster.url, MODEL, pools([bundles.one, bundles.two]))
            load = {"rate": options.rate, "devices": options.devices, "duration_s": 3000.0}
            fleets = [
                Fleet(cluster.url, bundle=str(bundle), **load)
                for bundle in (bundles.one, bundles.two)
            ]
            try:
                for fleet in fleets:
                    fleet.wait_running()
                upgrades.all()
                until(
                    lambda: (
                        sum(f.requests for f in fleets) + len(followers.answers) >= options.requests
                    ),
                    within_s=1200,
                )
            finally:
                for fleet in fleets:
                    fleet.stop()
                followers.stop()
                seen = [fleet.seen() for fleet in fleets]
    table = rows(upgrades.steps, seen, followers)
    counts = followers.counts(0, float("inf"))
    answered = sum(s.run.counters["requests_ok"] for s in seen)
    refused = [s for s in upgrades.steps if s.outcome != "done"]
    report.show(
        f"{REPLICAS} replicas on one machine; two fleets of {options.devices} devices, "
        f"{options.rate:g} inferences per second each, and {followers.clients} clients that name "
        "no version",
        table,
        [
            "failed: inferences and requests without an answer; wrong: other values than the "
            "version makes of them; mixed-version: rows of more than one version in one answer, or "
            "of another than it names",
            f"answers to clients that named no version: {dict(followers.named(0, float('inf')))}",
            f"retries: {sum(s.summary.retries for s in seen) + followers.retries}; messages that "
            f"moved with their stream: {sum(s.summary.moved for s in seen)}",
            "the figures count from the first request to the last, the rows between steps too",
        ],
        options.json,
        requests=float(answered + counts.total()),
        failed=float(sum(s.lost for s in seen) + counts["failed"]),
        wrong=float(sum(s.summary.wrong for s in seen) + counts["wrong"]),
        stray=float(sum(s.strays for s in seen)),
        mixed_version=float(counts["mixed"]),
        refused=float(len(refused)),
    )


if __name__ == "__main__":
    main()

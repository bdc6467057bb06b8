"""`datamix demo`: the whole system on this machine, in a few minutes, with an honest report."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.local import local_cluster, local_operators
from datamix.bundle import Manifest, read_manifest
from datamix.errors import ConfigError
from deployments.config import Config
from edge.fleet.config import FleetConfig
from edge.fleet.page import write_page
from edge.fleet.report import Summary
from edge.fleet.run import simulate
from edge.fleet.view import duration, live_view, number, offline_rows, percentile_text, share
from edge.modes import check_mode

BUNDLE = "fashion-mnist-mix"
INTERRUPTED = 130

OPERATORS = ("operator-a", "operator-b")
ONE_MACHINE = (
    "Both applications run on this machine, and whoever runs a machine sees all that is on it: "
    "whatever names they declare, there is one operator. The demo allows that "
    "(--allow-same-operator), and its results are therefore marked NOT PRIVATE."
)

_RATES = {"mix": 150.0, "bounded": 150.0, "split": 75.0}  # what two cores do without a queue
_TITLES = {
    "mix": "Devices mixed, an untrusted cloud computed, devices de-mixed",
    "bounded": "Devices mixed and added noise, an untrusted cloud computed, devices de-mixed",
    "split": "Devices hid inputs in noise, two applications computed, devices subtracted",
}


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """One demo.

    Attributes:
        bundle: the bundle to deploy and to infer with; None for the one of the repository.
        devices: simulated devices, a stream each.
        rate: inferences per second of all devices together, each a group of images; None for 150,
            or 75 in the mode split, where each is computed twice and its noise is made twice.
        duration_s: for how long inferences fall due.
        seed: of the schedule.
        processes: processes that hold the devices.
        mode: what leaves the devices; None for the mode that the bundle was made for.
        port: the front door's port; None for a free one.
        json_path: where the figures go as JSON; None for nowhere.
        html_path: where the report goes.
    """

    bundle: str | None = None
    devices: int = 2000
    rate: float | None = None
    duration_s: float = 20.0
    seed: int = 0
    processes: int = 1
    mode: str | None = None
    port: int | None = None
    json_path: Path | None = None
    html_path: Path = Path("demo-report.html")


def default_bundle() -> str:
    """The bundle that the repository ships.

    Raises:
        ConfigError: this is not a checkout of the repository.
    """
    path = Path(__file__).resolve().parents[1] / "bundles" / BUNDLE
    if not (path / "manifest.json").exists():
        raise ConfigError(f"no bundle is at bundles/{BUNDLE}, expected --bundle with a folder")
    return str(path)


def demo(config: DemoConfig) -> int:
    """Start a cluster, let the fleet loose on it, report; return the exit code.

    In the mode split, two applications stand for two operators, on one machine.

    0: valid, and every answer was right. 1: the cloud failed some. 3: the figures are not the
    cloud's. 130: interrupted.

    Raises:
        ConfigError: a setting or this machine does not allow it.
        DataMixError: the cluster did not come up.
    """
    bundle = config.bundle or default_bundle()
    manifest = read_manifest(bundle)
    mode = check_mode(manifest, config.mode)
    for path in (config.json_path, config.html_path):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path.parent} is no folder, expected one to write {path.name} to")
    console = Console(stderr=True)
    with _clouds(mode, bundle, config.port, console) as urls:
        _say(console, f"{config.devices} devices infer for {config.duration_s:g} s")
        with live_view(console) as on_progress:
            summary = simulate(
                FleetConfig(
                    url=urls[0],
                    bundle=bundle,
                    mode=mode,
                    second=urls[1] if len(urls) > 1 else None,
                    allow_same_operator=len(urls) > 1,
                    devices=config.devices,
                    rate=config.rate or _RATES[mode],
                    duration_s=config.duration_s,
                    seed=config.seed,
                    processes=config.processes,
                ),
                on_progress,
            )
    edge_flops_share = flops_share(manifest)
    rows = figures(summary, edge_flops_share)
    Console().print(_table(rows, mode))
    if summary.not_private is not None:
        print(ONE_MACHINE)
    if config.json_path is not None:
        result = {**summary.as_dict(), "edge_flops_share": edge_flops_share}
        config.json_path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    extra = [("share of the FLOPs on the device", share(edge_flops_share))]  # the rest it has
    if summary.not_private is not None:
        extra.insert(0, ("NOT PRIVATE", ONE_MACHINE))
    write_page(config.html_path, summary, summary.series, extra, "DataMix: the demo's report")
    print(f"report: {config.html_path}", file=sys.stderr)
    return INTERRUPTED if summary.interrupted else summary.exit_code


@contextlib.contextmanager
def _clouds(mode: str, bundle: str, port: int | None, console: Console) -> Iterator[list[str]]:
    """The clouds that a mode needs, on this machine; yields their URLs."""

    def say(text: str) -> None:
        _say(console, text)

    settings = Config(bundle=bundle)
    if mode != "split":
        with local_cluster(settings, port=port, say=say) as cluster:
            yield [cluster.url]
        return
    _say(console, ONE_MACHINE)
    with local_operators(settings, OPERATORS, port=port, say=say) as urls:
        yield urls


def flops_share(manifest: Manifest) -> float:
    """Share of an inference's FLOPs that the device computes, mixing and de-mixing included."""
    from datamix.models import Architecture, build, count_flops

    spec = manifest.architecture
    model = build(Architecture(spec.name, spec.options))
    return count_flops(model, group_size=manifest.group_size).edge_share


def figures(summary: Summary, edge_flops_share: float) -> list[tuple[str, str]]:
    """What the demo is about, in the order a newcomer asks."""
    return [
        ("privacy", summary.privacy),
        ("accuracy through the cloud", share(summary.accuracy_cloud)),
        ("accuracy of the same bundle run locally", share(summary.accuracy_local)),
        ("answers verified: right, wrong", f"{summary.ok}, {summary.wrong}"),
        ("failed or unsent", str(sum(summary.failed.values()) + summary.unsent)),
        ("share of the FLOPs on the device", share(edge_flops_share)),
        ("rounds per inference", str(summary.rounds)),
        ("offered, answered", f"{summary.offered_rate:.0f}, {summary.throughput:.0f} requests/s"),
        ("images classified", f"{summary.inferences_per_s * summary.group_size:.0f} per second"),
        ("latency of an inference", percentile_text(summary.latency_s)),
        ("mean batch", f"{number(summary.batch_rows_mean)} rows"),
        ("engine utilisation", share(summary.engine_busy_ratio)),
        (
            "in the cloud per request",
            f"queue {duration(summary.queue_s)}, compute {duration(summary.compute_s)}",
        ),
        (
            "bytes per image, all rounds"
            if summary.masks_fetched is None
            else "bytes per image online, to operator A",
            f"{summary.bytes_up_per_input or 0:,.0f} up, "
            f"{summary.bytes_down_per_input or 0:,.0f} down",
        ),
        *offline_rows(summary),
        ("valid", "yes" if summary.valid else f"NO: {summary.invalid_reason}"),
    ]


def _table(rows: list[tuple[str, str]], mode: str) -> Table:
    view = Table(
        title=_TITLES[mode],
        show_header=False,
        title_justify="left",
    )
    view.add_column(style="bold")
    view.add_column()
    for name, figure in rows:
        view.add_row(name, figure)
    return view


def _say(console: Console, text: str) -> None:
    console.print(f"[dim]…[/dim] {text}", highlight=False)

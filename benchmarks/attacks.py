"""Attacks x modes: what each attack of edge/audit gets out of real traffic, beside its floor.

    python -m benchmarks.attacks --data DIR --json docs/benchmarks/attacks.json

The real client infers against blocks in this process, and what crossed the wire is recorded
(edge/audit/record.py). Settings are those of docs/attacks.md; noise that the bundle was not made
for is declared in a copy of its manifest, as privacy depends on it and accuracy is another matter.

``bounded-known`` is the bound's own case, coefficients known to the attacker: Gaussian noise stays
Gaussian when it is rotated, so what remains is what operator A of `split` sees at the same sigma.

A network that an experiment kept (``--runs`` of `datamix experiment`) is attacked by

    python -m benchmarks.attacks --dataset fashion-mnist --network FILE.pt --name bounded --sigmas 1

in the mode `bounded` at these deviations where it was trained for that, else in `mix` and `split`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from benchmarks.attacked import kept_bundle, untrained
from benchmarks.report import environment
from datamix.bundle import (
    BoundedSpec,
    Manifest,
    SplitSpec,
    read_manifest,
)
from datamix.errors import ConfigError
from edge.audit.attack import Attack, Budget, Claim
from edge.audit.attacks import suite
from edge.audit.capture import Capture
from edge.audit.material import Material, load_material
from edge.audit.observation import Observation, Operator, Public
from edge.audit.record import open_model, record
from edge.audit.scoring import Scorer, verdict
from edge.audit.truth import Truth
from edge.promises import promise
from edge.runtime import TorchDevice

SCHEMA_VERSION = 1
PAGE = Path(__file__).parents[1] / "docs" / "attacks.md"
_BEGIN, _END = "<!-- table of benchmarks.attacks -->", "<!-- end of the table -->"
_ORDER = (
    *("mode", "sigma", "dataset", "bundle", "repeats", "group_size", "attack", "operator"),
    "metric",
)
BUNDLES = Path(__file__).parents[1] / "bundles"
KNOWN = "bounded-known"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One capture.

    Attributes:
        bundle: its name; "" for an untrained network on ``dataset``.
        dataset: where gallery and public data come from.
        mode: "mix", "bounded", "split", or "bounded-known".
        sigma: of the noise; 0 for mix.
        group_size: K.
        groups: of victims.
        repeats: inferences of each, in a row.
    """

    bundle: str
    dataset: str
    mode: str
    sigma: float
    group_size: int
    groups: int
    repeats: int = 1


def settings(groups: int) -> tuple[Setting, ...]:
    """All captures of docs/attacks.md."""
    fashion, speech = "fashion-mnist-mix", "speech-commands-mix"
    found = [
        Setting(fashion, "fashion-mnist", "mix", 0, 4, groups),
        Setting(fashion, "fashion-mnist", "mix", 0, 8, groups),
        Setting("fashion-mnist-one-round", "fashion-mnist", "mix", 0, 4, groups),
        Setting("", "cifar10", "mix", 0, 4, groups),
        Setting("", "cifar10", "mix", 0, 8, groups),
        Setting(speech, "speech-commands", "mix", 0, 4, groups // 2),
    ]
    for mode, sigmas in (("bounded", (0.3, 1, 2, 4)), (KNOWN, (0.3, 1, 2, 4))):
        found += [Setting(fashion, "fashion-mnist", mode, sigma, 4, groups) for sigma in sigmas]
    for repeats in (4, 16):
        found.append(Setting(fashion, "fashion-mnist", "bounded", 4, 4, groups, repeats))
    for sigma in (10, 70, 310):  # the last one is the shipped bundle's
        found.append(Setting(fashion, "fashion-mnist", "split", sigma, 4, groups))
    found.append(
        Setting("fashion-mnist-one-round", "fashion-mnist", "split", 310, 4, groups),
    )
    found.append(Setting(speech, "speech-commands", "split", 720, 4, groups))
    return tuple(found)


def network_settings(
    bundle: Path, dataset: str, sigmas: Sequence[float], groups: int
) -> tuple[Setting, ...]:
    """Captures of a network of :func:`kept_bundle`."""
    manifest = read_manifest(bundle)
    name = manifest.name
    if manifest.mode != "bounded":
        found = [Setting(name, dataset, "mix", 0, size, groups) for size in (4, 8)]
        assert manifest.split is not None  # linear, so made for it
        return (*found, Setting(name, dataset, "split", manifest.split.sigma, 4, groups))
    if not sigmas:
        raise ConfigError(
            f"{name} was trained with noise, expected --sigmas, those of its training"
        )
    modes = ("bounded", KNOWN)
    found = [Setting(name, dataset, mode, s, 4, groups) for mode in modes for s in sigmas]
    found += [Setting(name, dataset, "bounded", s, 4, groups, 16) for s in sigmas]
    return tuple(found)


def declared(manifest: Manifest, setting: Setting) -> Manifest:
    """The manifest with this setting's noise and K."""
    update: dict[str, Any] = {"group_size": setting.group_size}
    if setting.mode == "bounded":
        update["bounded"] = BoundedSpec(sigma=setting.sigma)
    elif setting.mode != "mix" and (manifest.split is None or not _own(manifest, setting)):
        update["split"] = SplitSpec(sigma=setting.sigma, wire_dtype="float32", tolerance=1.0)
    return manifest.model_copy(update=update)


def _own(manifest: Manifest, setting: Setting) -> bool:
    """Whether the noise is what the bundle was made for, so that its own wire is attacked."""
    return manifest.split is not None and manifest.split.sigma == setting.sigma


def attack_setting(
    setting: Setting,
    bundle: Path,
    material: Material,
    attacks: Sequence[Attack],
    seconds: float,
    seed: int,
) -> Iterator[Row]:
    """Rows of one capture."""
    device = TorchDevice(bundle)
    manifest = device.manifest = declared(device.manifest, setting)
    mode = "split" if setting.mode == KNOWN else setting.mode
    capture, truth = record(
        bundle, device, mode, material, setting.groups, seed=seed, repeats=setting.repeats
    )
    public = Public(
        manifest, open_model(bundle), material.training, material.gallery, material.gallery_labels
    )
    # A group that was sent several times counts once, or intervals would be too narrow.
    scorer = Scorer(public, truth.victims[:: setting.repeats], seed)
    for attack in attacks:
        if mode not in attack.modes or (setting.mode == KNOWN and attack.name != "noisy-decoder"):
            continue
        for operator in get_args(Operator):
            if operator in attack.operators and operator in capture.operators():
                yield from _rows(attack, operator, capture, truth, public, scorer, setting, seconds)


def _rows(
    attack: Attack,
    operator: Operator,
    capture: Capture,
    truth: Truth,
    public: Public,
    scorer: Scorer,
    setting: Setting,
    seconds: float,
) -> Iterator[Row]:
    mode = capture.header.mode
    begin_s = time.perf_counter()
    observation = Observation(mode, operator, capture.of(operator), public)
    claim = once(attack.run(observation, Budget(seconds, truth.seed)), setting.repeats)
    took_s = time.perf_counter() - begin_s
    promised = promise(public.manifest, mode).bits_per_input * setting.repeats
    bound = 0.0 if operator == "B" else promised
    for score in scorer.score(claim):
        yield {
            "attack": attack.name,
            "mode": setting.mode,
            "sigma": setting.sigma,
            "operator": operator,
            "dataset": setting.dataset,
            "bundle": public.manifest.name,
            "group_size": setting.group_size,
            "groups": setting.groups,
            "repeats": setting.repeats,
            "metric": score.metric,
            "value": score.found.value,
            "low": score.found.low,
            "high": score.found.high,
            "floor": score.floor.value,
            "floor_low": score.floor.low,
            "floor_high": score.floor.high,
            "floor_is": score.floor_is,
            "n": score.n,
            "verdict": verdict(score.found, score.floor, bound),
            "bound_bits": None if math.isinf(bound) else bound,
            "seconds": took_s,
            "notes": claim.notes,
        }


def once(claim: Claim, repeats: int) -> Claim:
    """What is claimed of the first of each so many requests; of pairs, nothing."""
    if repeats == 1:
        return claim
    parts = (claim.inputs, claim.gallery_scores, claim.attributes)
    inputs, scores, attributes = (None if part is None else part[::repeats] for part in parts)
    return Claim(inputs, scores, attributes, notes=claim.notes)


def _line(row: Row) -> str:
    return (
        f"{row['dataset']:16s} {row['mode']:13s} sigma {row['sigma']:<5g} K {row['group_size']}"
        f" x{row['repeats']}"
        f" {row['attack']:18s} {row['metric']:12s} {row['value']:7.3f}"
        f" [{row['low']:.3f}, {row['high']:.3f}] floor {row['floor']:.3f}"
        f" [{row['floor_low']:.3f}, {row['floor_high']:.3f}] {row['verdict']}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all or some settings and attacks; print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder of data sets; else DATAMIX_DATA")
    parser.add_argument("--groups", type=int, default=25, help="inferences in each capture")
    parser.add_argument("--seconds", type=float, default=90, help="for each attack")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", default="", help="only these, with commas")
    parser.add_argument("--datasets", default="", help="only these, with commas")
    parser.add_argument("--bundles", default="", help="only these, with commas")
    parser.add_argument("--network", type=Path, help="weights that an experiment kept")
    parser.add_argument("--name", default="kept", help="of that network, as its arm's")
    parser.add_argument("--dataset", default="fashion-mnist", help="that network's")
    parser.add_argument("--sigmas", default="", help="only these, with commas")
    parser.add_argument("--attacks", default="", help="only these, with commas")
    parser.add_argument("--page", action="store_true", help="only write docs/attacks.md's table")
    parser.add_argument("--json", type=Path, help="where rows go, added to what is there")
    given = parser.parse_args(arguments)
    if given.page:
        write_page(_before(given.json)["rows"])
        return 0
    attacks = suite(given.attacks.split(",") if given.attacks else None)
    before = _before(given.json)
    with tempfile.TemporaryDirectory() as folder:
        kept = _kept(given, Path(folder))
        chosen = settings(given.groups)
        if kept is not None:
            chosen = network_settings(kept, given.dataset, _numbers(given.sigmas), given.groups)
        _run(given, chosen, kept, attacks, before)
    return 0


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def _kept(given: argparse.Namespace, folder: Path) -> Path | None:
    """The bundle of the network that is given, if one is."""
    if given.network is None:
        return None
    sigma = (_numbers(given.sigmas) or [1.0])[0]
    return kept_bundle(given.network, given.name, given.dataset, sigma, given.data, folder)


def _run(
    given: argparse.Namespace,
    chosen: Sequence[Setting],
    kept: Path | None,
    attacks: Sequence[Attack],
    before: dict[str, Any],
) -> None:
    """Attack the settings that are asked for; rows are written after each."""
    rows: list[Row] = []
    for setting in chosen:
        if given.modes and setting.mode not in given.modes.split(","):
            continue
        if given.sigmas and setting.mode != "mix" and setting.sigma not in _numbers(given.sigmas):
            continue
        if given.bundles and setting.bundle not in given.bundles.split(","):
            continue
        if kept is None and given.datasets and setting.dataset not in given.datasets.split(","):
            continue
        with tempfile.TemporaryDirectory() as folder:
            bundle = kept or BUNDLES / setting.bundle
            if not setting.bundle:
                bundle = untrained(setting.dataset, given.data, Path(folder), given.seed)
            material = load_material(
                read_manifest(bundle), setting.dataset, given.data, seed=given.seed
            )
            for row in attack_setting(
                setting, bundle, material, attacks, given.seconds, given.seed
            ):
                print(_line(row), flush=True)
                rows.append(row)
        if given.json is not None:
            given.json.write_text(document(before, rows, given))


_WHICH = (
    *("attack", "bundle", "dataset", "mode", "sigma", "group_size", "operator", "metric"),
    "repeats",
)


def _before(path: Path | None) -> dict[str, Any]:
    """What the file holds already."""
    if path is None or not path.exists():
        return {"runs": [], "rows": []}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def document(before: dict[str, Any], rows: list[Row], given: argparse.Namespace) -> str:
    """The JSON text: this run's surroundings, all runs, and all rows; newer ones replace older."""
    head = {"schema_version": SCHEMA_VERSION, **environment(), "seed": given.seed}
    # Rows of before there were repeats have none of that key.
    both = [{"repeats": 1, **row} for row in (*before["rows"], *rows)]
    found = {tuple(row[key] for key in _WHICH): row for row in both}
    runs = [*before["runs"], head["command"]]
    return json.dumps({**head, "runs": runs, "rows": list(found.values())}, indent=1) + "\n"


def _network(row: Row) -> str:
    """Which network it was, where it is not the data set's usual one."""
    name: str = row["bundle"].removeprefix(row["dataset"]).removeprefix("-")
    return "" if name in ("mix", "untrained") else f", {name.replace('-', ' ')}"


def write_page(rows: Sequence[Row], page: Path = PAGE) -> None:
    """Put all rows into the table of docs/attacks.md, between its marks."""
    before, _, rest = page.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    columns = ("data", "mode", "sigma", "K", "n", "attack", "metric", "value", "floor", "verdict")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in sorted(rows, key=lambda row: [str(row.get(key, 1)) for key in _ORDER]):
        copies = row.get("repeats", 1)
        cells = (
            row["dataset"] + _network(row),
            row["mode"] + (f", {copies} copies" if copies > 1 else ""),
            f"{row['sigma']:g}" if row["sigma"] else "",
            str(row["group_size"]),
            str(row["n"]),
            row["attack"],
            row["metric"],
            f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
            f"{row['floor']:.3f} ({row['floor_low']:.3f} to {row['floor_high']:.3f})",
            row["verdict"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    page.write_text(before + _BEGIN + "\n" + "\n".join(lines) + "\n" + _END + after)


if __name__ == "__main__":
    sys.exit(main())

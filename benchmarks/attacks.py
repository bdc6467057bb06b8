"""Attacks x modes: what each attack of edge/audit gets out of real traffic, beside its floor.

    python -m benchmarks.attacks --data DIR --json docs/benchmarks/attacks.json

The real client infers against blocks in this process, and what crossed the wire is recorded
(edge/audit/record.py). Settings are those of docs/attacks.md; noise that the bundle was not made
for is declared in a copy of its manifest, as privacy depends on it and accuracy is another matter.

``bounded-known`` is the bound's own case, coefficients known to the attacker: Gaussian noise stays
Gaussian when it is rotated, so what remains is what operator A of `split` sees at the same sigma.
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

import torch

from benchmarks.report import environment
from datamix.bundle import (
    ArchitectureSpec,
    BoundedSpec,
    Manifest,
    SplitSpec,
    read_manifest,
    save_bundle,
)
from datamix.models import Architecture, build
from edge.audit.attack import Attack, Budget
from edge.audit.attacks import suite
from edge.audit.capture import Capture
from edge.audit.material import Material, load_material
from edge.audit.observation import Observation, Operator, Public
from edge.audit.record import open_model, record
from edge.audit.scoring import Scorer, verdict
from edge.audit.truth import Truth
from edge.data import load_dataset
from edge.preprocess import preprocessor
from edge.promises import promise
from edge.runtime import TorchDevice

SCHEMA_VERSION = 1
PAGE = Path(__file__).parents[1] / "docs" / "attacks.md"
_BEGIN, _END = "<!-- table of benchmarks.attacks -->", "<!-- end of the table -->"
_ORDER = ("mode", "sigma", "dataset", "bundle", "group_size", "attack", "operator", "metric")
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
        groups: inferences.
    """

    bundle: str
    dataset: str
    mode: str
    sigma: float
    group_size: int
    groups: int


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
    for sigma in (10, 70, 310):  # the last one is the shipped bundle's
        found.append(Setting(fashion, "fashion-mnist", "split", sigma, 4, groups))
    return tuple(found)


def declared(manifest: Manifest, setting: Setting) -> Manifest:
    """The manifest with this setting's noise and K."""
    update: dict[str, Any] = {"group_size": setting.group_size}
    if setting.mode == "bounded":
        update["bounded"] = BoundedSpec(sigma=setting.sigma)
    elif setting.mode != "mix":
        update["split"] = SplitSpec(sigma=setting.sigma, wire_dtype="float32", tolerance=1.0)
    return manifest.model_copy(update=update)


def untrained(dataset: str, directory: Path | None, folder: Path, seed: int = 0) -> Path:
    """A bundle of a network with random weights, its norms set by public inputs."""
    data = load_dataset(dataset, "train", directory)
    shape = data.preprocessing.input_shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options: dict[str, int | str] = {
            "input": ",".join(map(str, shape)),
            "classes": len(data.class_names),
            "cloud": "linear",
        }
        model = build(Architecture("bridgenet", options))
        inputs = torch.from_numpy(preprocessor(data.preprocessing)(data.inputs[slice(0, 512)]))
        with torch.no_grad():
            for _ in range(60):
                model(inputs[torch.randperm(len(inputs))[:64]])
    save_bundle(
        folder / "untrained",
        model.eval(),
        name=f"{dataset}-untrained",
        version="1",
        mode="mix",
        group_size=4,
        architecture=ArchitectureSpec(name="bridgenet", options=options),
        preprocessing=data.preprocessing,
        class_names=data.class_names,
        tolerance=0.05,
        metrics={},
    )
    return folder / "untrained"


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
    capture, truth = record(bundle, device, mode, material, setting.groups, seed=seed)
    public = Public(
        manifest, open_model(bundle), material.training, material.gallery, material.gallery_labels
    )
    scorer = Scorer(public, truth.victims, seed)
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
    claim = attack.run(observation, Budget(seconds, truth.seed))
    took_s = time.perf_counter() - begin_s
    promised = promise(public.manifest, mode).bits_per_input
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


def _line(row: Row) -> str:
    return (
        f"{row['dataset']:16s} {row['mode']:13s} sigma {row['sigma']:<5g} K {row['group_size']}"
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
    rows: list[Row] = []
    for setting in settings(given.groups):
        if given.modes and setting.mode not in given.modes.split(","):
            continue
        if given.sigmas and setting.sigma not in map(float, given.sigmas.split(",")):
            continue
        if given.datasets and setting.dataset not in given.datasets.split(","):
            continue
        with tempfile.TemporaryDirectory() as folder:
            bundle = BUNDLES / setting.bundle
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
    return 0


_WHICH = ("attack", "bundle", "dataset", "mode", "sigma", "group_size", "operator", "metric")


def _before(path: Path | None) -> dict[str, Any]:
    """What the file holds already."""
    if path is None or not path.exists():
        return {"runs": [], "rows": []}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def document(before: dict[str, Any], rows: list[Row], given: argparse.Namespace) -> str:
    """The JSON text: this run's surroundings, all runs, and all rows; newer ones replace older."""
    head = {"schema_version": SCHEMA_VERSION, **environment(), "seed": given.seed}
    found = {tuple(row[key] for key in _WHICH): row for row in (*before["rows"], *rows)}
    runs = [*before["runs"], head["command"]]
    return json.dumps({**head, "runs": runs, "rows": list(found.values())}, indent=1) + "\n"


def write_page(rows: Sequence[Row], page: Path = PAGE) -> None:
    """Put all rows into the table of docs/attacks.md, between its marks."""
    before, _, rest = page.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    columns = ("data", "mode", "sigma", "K", "n", "attack", "metric", "value", "floor", "verdict")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in sorted(rows, key=lambda row: [str(row[key]) for key in _ORDER]):
        cells = (
            row["dataset"] + (", one round" if row["bundle"].endswith("one-round") else ""),
            row["mode"],
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

"""`datamix audit`, without the command line: record or read, attack, score, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datamix.bundle import Manifest
from datamix.errors import ConfigError
from edge.audit.attacks import suite
from edge.audit.audit import Outcome, Plan, audit
from edge.audit.capture import Capture, read_capture, write_capture
from edge.audit.material import SAMPLE, Material, load_material
from edge.audit.observation import Public
from edge.audit.page import write_page
from edge.audit.record import Ends, open_model, open_sized, record
from edge.audit.report import Report
from edge.audit.truth import Truth, read_truth, truth_path, write_truth
from edge.session import Device

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """One audit, as asked for.

    Attributes:
        bundle: folder or URI.
        mode: what leaves the device; None for the bundle's own, or the capture's.
        capture: an existing one; its truth is looked for beside it.
        groups: inferences to record.
        group_size: K; None for the bundle's.
        attacks: names; None for all.
        budget_s: for all attacks, in seconds.
        dataset: a name of :data:`edge.data.NAMES`, or "sample".
        directory: of the data set's files.
        seed: of everything random but what protects the inputs.
        ends: real operators to record at.
        json_path: rows as JSON; what is there is taken up again.
        html_path: the page.
    """

    bundle: str
    mode: str | None = None
    capture: Path | None = None
    groups: int = 100
    group_size: int | None = None
    attacks: Sequence[str] | None = None
    budget_s: float = 600.0
    dataset: str = SAMPLE
    directory: Path | None = None
    seed: int = 0
    ends: Ends | None = None
    json_path: Path | None = None
    html_path: Path | None = None


def run(config: AuditConfig, tell: Tell = print) -> Outcome:
    """Audit.

    A capture that was recorded for a JSON file is kept beside it, so that the same command goes on
    from there.

    Raises:
        ConfigError: settings, files or data that will not do.
        BundleError: a bundle that cannot be read or trusted.
        DataMixError: the cloud could not be made to answer.
    """
    attacks = suite(config.attacks)
    kept = config.capture
    if kept is None and config.json_path is not None:
        beside = config.json_path.with_suffix(".capture")
        kept = beside if beside.exists() else None
    capture = None if kept is None else read_capture(kept)
    truth = None if kept is None or not truth_path(kept).exists() else read_truth(truth_path(kept))
    size = config.group_size if capture is None else capture.header.group_size
    device = open_sized(config.bundle, size)
    manifest = device.manifest
    seed = config.seed if truth is None else truth.seed
    material = load_material(manifest, config.dataset, config.directory, seed=seed)
    if capture is None or kept is None:
        capture, truth = _record(config, device, material, tell)
    else:
        _check(config, capture, kept, truth, tell)
        if config.capture is None:
            _check_same(config, kept, truth)
    plan = Plan(attacks, config.budget_s, seed, config.json_path, tell)
    outcome = audit(capture, _public(config, manifest, material), material, truth, plan)
    if config.html_path is not None:
        write_page(config.html_path, outcome.report)
    return outcome


def _record(
    config: AuditConfig, device: Device, material: Material, tell: Tell
) -> tuple[Capture, Truth]:
    capture, truth = record(
        config.bundle,
        device,
        config.mode,
        material,
        config.groups,
        seed=config.seed,
        ends=config.ends,
        report=tell,
    )
    if config.json_path is not None:
        path = config.json_path.with_suffix(".capture")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_truth(truth_path(path), truth)  # first: a capture without it is one of a stranger
        write_capture(path, capture)
    return capture, truth


def _check(
    config: AuditConfig, capture: Capture, path: Path, truth: Truth | None, tell: Tell
) -> None:
    header = capture.header
    for what, wanted, found in (
        ("mode", config.mode, header.mode),
        ("group size", config.group_size, header.group_size),
    ):
        if wanted is not None and wanted != found:
            raise ConfigError(f"{path.name} has the {what} {found!r}, expected {wanted!r}")
    tell(f"{path.name}: {len(capture.messages)} messages, mode {header.mode}")
    if truth is None:
        tell(f"no {truth_path(path).name} beside it: claims are not scored")


def _check_same(config: AuditConfig, path: Path, truth: Truth | None) -> None:
    """Refuse to go on from a recording of another size or seed as if it were what is asked for."""
    if truth is not None and (len(truth.victims), truth.seed) != (config.groups, config.seed):
        raise ConfigError(
            f"{path.name} has {len(truth.victims)} groups by seed {truth.seed}, expected"
            f" {config.groups} by {config.seed}; another JSON file gets a recording of its own"
        )


def _public(config: AuditConfig, manifest: Manifest, material: Material) -> Public:
    return Public(
        manifest,
        open_model(config.bundle),
        material.training,
        material.gallery,
        material.gallery_labels,
    )


def summary(report: Report) -> str:
    """The mode, its promise and its known break, for above a table."""
    return f"{report.promise}\nknown break: {report.known_break}"

"""An experiment: all arms of a preset, all seeds, one budget; every row goes to the results."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from datamix.errors import ConfigError
from edge.batches import held_out
from edge.data import Dataset
from edge.fit import Fitted, Report
from edge.measurement import measure
from edge.methods import METHODS
from edge.mixtures import Mixing
from edge.presets import Arm, Preset, check_preset
from edge.results import Row, digest, put_rows, read_rows
from edge.runs import check_fit, fit_method
from edge.settings import TrainConfig
from edge.weights import keep, load


@dataclass(frozen=True, slots=True)
class Job:
    """One training, and where its network is measured.

    Attributes:
        arm: whose.
        config: settings; the teacher is still a label.
        points: one row each.
    """

    arm: Arm
    config: TrainConfig
    points: tuple[Mixing, ...]

    @property
    def name(self) -> str:
        """Of the files that the training keeps: arms of the same settings share them."""
        config = self.config
        size = f"-k{config.group_size}" if METHODS[config.method].mixes else ""
        size += f"-sigma{config.noise_sigma:g}" if config.noise_sigma else ""
        marks = digest(config.to_json())[:8]
        return f"{config.method}{size}-seed{config.seed}-{marks}"


def jobs(
    preset: Preset, seeds: Sequence[int], labels: Sequence[str] = (), **changes: Any
) -> list[Job]:
    """All trainings of an experiment, seed by seed, in the order of the arms.

    A method that is trained unmixed is trained once and measured at every group size and law; one
    that is trained on mixtures is trained for each, and for each deviation of the noise.

    Args:
        preset: what to compare.
        seeds: of the trainings.
        labels: arms to take, besides the teachers of these; all if empty.
        changes: settings over those of the preset.

    Raises:
        ConfigError: an unknown label, or settings that cannot work.
    """
    check_preset(preset)
    known = [arm.label for arm in preset.arms]
    if unknown := set(labels) - set(known):
        raise ConfigError(f"arm is {min(unknown)!r}, expected one of {', '.join(known)}")
    wanted = {*labels, *(arm.teacher for arm in preset.arms if arm.label in labels)}
    found = []
    for seed in seeds:
        for arm in preset.arms:
            if labels and arm.label not in wanted:
                continue
            points = [(size, law) for law in arm.laws for size in arm.group_sizes]
            if not METHODS[arm.method].mixes:
                config = preset.settings(arm, seed, **{**changes, "teacher": arm.teacher})
                at = tuple(Mixing(size, law, config.noise_sigma) for size, law in points)
                found.append(Job(arm, config, at))
                continue
            for (size, law), noise in product(points, _noises(arm)):
                settings = {**changes, "teacher": arm.teacher, "group_size": size, "law": law}
                config = preset.settings(arm, seed, **settings, **noise)
                found.append(Job(arm, config, (Mixing(size, law, config.noise_sigma),)))
    return found


def _noises(arm: Arm) -> list[dict[str, float]]:
    """Settings of the noise, for each network of an arm; what its own settings say, if anything."""
    return [{"noise_sigma": sigma} for sigma in arm.sigmas] or [{}]


def experiment(
    preset: Preset,
    training: Dataset,
    test: Dataset,
    *,
    seeds: Sequence[int],
    results: Path,
    runs: Path,
    labels: Sequence[str] = (),
    report: Report = print,
    stop: Callable[[], bool] = lambda: False,
    **changes: Any,
) -> list[Row]:
    """Train and measure what has no row yet; the same call goes on after an interruption.

    Two such calls may run side by side: each training is done by whoever comes first.

    Args:
        preset: what to compare.
        training: inputs to learn from.
        test: inputs to measure with, for no choice.
        seeds: of the trainings.
        results: the file of rows.
        runs: folder for checkpoints and weights, which teachers are read from.
        labels: arms to take; all if empty.
        report: gets lines of progress.
        stop: asked after every step; True saves a checkpoint and ends.
        changes: settings over those of the preset.

    Returns:
        The rows that were measured now.

    Raises:
        ConfigError: settings or data that do not fit.
        KeyboardInterrupt: ``stop`` said so.
    """
    todo = jobs(preset, seeds, labels, **changes)
    for job in todo:
        check_fit(job.config, training)
    runs.mkdir(parents=True, exist_ok=True)
    measured: list[Row] = []
    for number, job in enumerate(todo, start=1):
        title = f"[{number}/{len(todo)}] {job.arm.label}, {job.name}"
        kept = _Kept(runs / preset.name, job)
        if _rows_exist(job, results, test) and (kept.exists or not _teaches(job, preset)):
            report(f"{title}: its rows are there already")
            continue
        with kept.claimed() as ours:
            if not ours:
                report(f"{title}: another process is at it")
                continue
            config = job.config
            if config.teacher is not None:
                teacher = _Kept(runs / preset.name, _teacher(job, todo))
                if not teacher.exists:
                    report(f"{title}: its teacher is not trained yet; run the same again later")
                    continue
                config = replace(config, teacher=str(teacher.weights))
            part, fitted = kept.trained(
                config, training, report=partial(_titled, report, title), stop=stop
            )
            rows = measure(
                part,
                fitted,
                job.config,
                len(held_out(training, config.validate)[0]),
                test,
                job.points,
                command=_command(preset, job, changes),
                preset=preset.name,
                label=job.arm.label,
            )
            put_rows(results, rows)
        for row in rows:
            noise = f", sigma {row.noise_sigma:g}" if row.noise_sigma else ""
            report(f"{title}: K = {row.group_size}, {row.law}{noise}: {row.accuracy:.2%}")
        measured += rows
    return measured


@dataclass(frozen=True, slots=True)
class Trained:
    """One network of an experiment.

    Attributes:
        part: the network, in eval mode.
        fitted: what its training took.
        config: its settings.
    """

    part: nn.Module
    fitted: Fitted
    config: TrainConfig


def trained(
    preset: Preset, label: str, seed: int, runs: Path, noise_sigma: float | None = None
) -> Trained:
    """A network that :func:`experiment` kept in ``runs``: the first one of arm ``label``.

    Args:
        preset: the experiment.
        label: the arm.
        seed: of the training.
        runs: where it is.
        noise_sigma: of the training, where the arm has several; the first one by default.

    Raises:
        ConfigError: it isn't there, or there is no such arm or deviation.
    """
    all_of_it = [job for job in jobs(preset, [seed], [label]) if job.arm.label == label]
    matching = [job for job in all_of_it if noise_sigma in (None, job.config.noise_sigma)]
    if not matching:
        sigmas = ", ".join(f"{job.config.noise_sigma:g}" for job in all_of_it)
        raise ConfigError(f"noise_sigma is {noise_sigma}, but {label} is trained at {sigmas}")
    job = matching[0]
    kept = _Kept(runs / preset.name, job)
    if not kept.exists:
        raise ConfigError(
            f"{runs} holds no training of {label} with seed {seed}, expected what"
            f" `datamix experiment {preset.name} --arms {label} --seeds {seed}` leaves there"
        )
    return Trained(*kept.read(), job.config)


def _titled(report: Report, title: str, line: str) -> None:
    report(f"{title}: {line}")


class _Kept:
    """What a training leaves in the folder of runs."""

    def __init__(self, folder: Path, job: Job) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._job = job
        self.weights = folder / f"{job.name}.pt"
        self._fitted = folder / f"{job.name}.json"
        self._checkpoint = folder / f"{job.name}.training.pt"
        self._lock = folder / f"{job.name}.lock"

    @property
    def exists(self) -> bool:
        """Whether the training is done; what it took is written last."""
        return self._fitted.exists()

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Whether the training is ours, as long as the context lasts."""
        with open(self._lock, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True

    def read(self) -> tuple[nn.Module, Fitted]:
        """The network and what its training took."""
        return load(self.weights), Fitted.from_json(json.loads(self._fitted.read_text()))

    def trained(
        self, config: TrainConfig, training: Dataset, *, report: Report, stop: Callable[[], bool]
    ) -> tuple[nn.Module, Fitted]:
        """The trained network: as it was kept, or trained now and kept."""
        if self.exists:
            return self.read()
        part, fitted = fit_method(config, training, self._checkpoint, report=report, stop=stop)
        keep(self.weights, part, config.method, config.architecture)
        temporary = self._fitted.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(fitted), indent=1) + "\n")
        temporary.replace(self._fitted)
        self._checkpoint.unlink(missing_ok=True)
        return part, fitted


def _rows_exist(job: Job, results: Path, test: Dataset) -> bool:
    """Whether each point of ``job`` has a row of these very settings."""
    marks = digest(job.config.to_json())
    there = {
        (row.group_size, row.law)
        for row in read_rows(results)
        if (row.settings, row.label) == (marks, job.arm.label)
        and (row.dataset, row.inputs[1]) == (test.name, len(test))
    }
    if not METHODS[job.config.method].mixed:
        return bool(there)
    return {(point.group_size, point.law) for point in job.points} <= there


def _teaches(job: Job, preset: Preset) -> bool:
    return any(arm.teacher == job.arm.label for arm in preset.arms)


def _teacher(job: Job, everything: Sequence[Job]) -> Job:
    """The training whose network is the teacher of ``job``."""
    (teacher,) = [
        other
        for other in everything
        if other.arm.label == job.arm.teacher and other.config.seed == job.config.seed
    ]
    return teacher


def _command(preset: Preset, job: Job, changes: Mapping[str, Any]) -> str:
    """The command that makes the rows of ``job`` again."""
    flags = [
        f"--{key.replace('_', '-')} {value}"
        for key, value in sorted(changes.items())
        if key != "teacher"
    ]
    words = [f"--arms {job.arm.label}", f"--seeds {job.config.seed}", *flags]
    return f"datamix experiment {preset.name} {' '.join(words)}"

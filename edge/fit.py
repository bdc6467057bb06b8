"""The loop: steps, epochs, progress, checkpoints.

Everything random in step ``s`` is drawn from (seed, s), and the learning rate is a function of
``s``: a checkpoint needs the step, the planned number of steps and the learner's state, nothing
else, and a run that was interrupted anywhere goes on bit for bit as if it had not been (same
machine, same number of threads).
"""

from __future__ import annotations

import copy
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from datamix.errors import ConfigError
from edge.batches import Batch, Batches, sample_rng
from edge.checkpoint import restore, store
from edge.data import Dataset
from edge.learner import Learner
from edge.schedules import learning_rate
from edge.settings import TrainConfig
from edge.workers import Alone, Workers

Report = Callable[[str], None]
# (network, batch, random numbers of the step, step, planned steps) -> loss
LossOf = Callable[[nn.Module, Batch, np.random.Generator, int, int], Tensor]
Measure = Callable[[nn.Module], float]

TRIAL_STEPS = 20
_TRIAL_WARM_UP = 4
_SCALARS_EVERY = 20  # steps


class Scalars(Protocol):
    """Takes figures as they come, for plots; ``torch.utils.tensorboard.SummaryWriter`` is one."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> None:
        """Figure ``tag`` had ``value`` after ``step`` steps."""
        ...


@dataclass(frozen=True, slots=True)
class Epoch:
    """What is known after an epoch, or after the part of one that the budget allowed.

    Attributes:
        steps: done so far.
        loss: mean over the epoch.
        seconds: of training so far.
        accuracy: on the inputs that were held out; None if none were.
    """

    steps: int
    loss: float
    seconds: float
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a training took, interruptions left out.

    Attributes:
        steps: all of them.
        epochs: passes over the data; not a whole number where processor time was the budget.
        seconds: by the clock on the wall.
        cpu_seconds: of the processor, over all threads; the measuring after each epoch left out.
        history: one entry per epoch.
    """

    steps: int
    epochs: float
    seconds: float
    cpu_seconds: float
    history: tuple[Epoch, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Fitted:
        """Back from what ``dataclasses.asdict`` gave."""
        return cls(**{**values, "history": tuple(Epoch(**epoch) for epoch in values["history"])})


def fit(
    part: nn.Module,
    loss_of: LossOf,
    config: TrainConfig,
    data: Dataset,
    checkpoint: Path,
    *,
    report: Report,
    stop: Callable[[], bool],
    measure: Measure | None = None,
    scalars: Scalars | None = None,
    workers: Workers | None = None,
    identity: str = "",
) -> Fitted:
    """Train ``part`` in place; it is left in eval mode, on the CPU, with the weights to keep.

    Goes on from ``checkpoint`` where it exists, writes it after every epoch and when stopped.

    Args:
        part: whose parameters learn.
        loss_of: see :data:`LossOf`.
        config: the settings.
        data: inputs to learn from.
        checkpoint: a file, replaced in one step.
        report: gets a line of progress every ten seconds.
        stop: asked after every step.
        measure: accuracy of a network, asked after every epoch.
        scalars: gets loss, rate, speed and accuracy.
        workers: those who train with us; by default nobody.
        identity: what else the checkpoint depends on, such as the teacher's weights.

    Raises:
        ConfigError: not enough data or budget, no such device, or a checkpoint of another run.
        KeyboardInterrupt: ``stop`` said so; the checkpoint is saved.
    """
    return _Fit(part, loss_of, config, data, workers or Alone()).run(
        checkpoint, identity, report=report, stop=stop, measure=measure, scalars=scalars
    )


class _Fit:
    """One call of :func:`fit`."""

    def __init__(
        self,
        part: nn.Module,
        loss_of: LossOf,
        config: TrainConfig,
        data: Dataset,
        workers: Workers,
    ) -> None:
        self._config, self._data, self._workers = config, data, workers
        self._loss_of = loss_of
        self._batches = Batches(data, config, workers.rank, workers.size)
        if config.budget_cpu_s is not None and workers.size > 1:
            raise ConfigError(
                f"budget_cpu_s is {config.budget_cpu_s} with {workers.size} workers,"
                " expected a number of epochs"
            )
        self._untrained = copy.deepcopy(part) if config.budget_cpu_s is not None else None
        self._learner = Learner(part, config, workers)
        self._watch = _Stopwatch()
        self._step, self._total = 0, self._batches.per_epoch * config.epochs
        self._loss_sum: Tensor | float = 0.0
        self._loss_count = 0
        self._history: list[Epoch] = []

    def run(
        self,
        checkpoint: Path,
        identity: str,
        *,
        report: Report,
        stop: Callable[[], bool],
        measure: Measure | None,
        scalars: Scalars | None,
    ) -> Fitted:
        leads = self._workers.rank == 0
        fingerprint = self._fingerprint(identity)
        saved = self._workers.share(restore(checkpoint, fingerprint) if leads else None)

        def save() -> None:
            if leads:
                store(checkpoint, fingerprint, self._state())

        if saved is not None:
            self._restore(saved)
            report(f"going on from step {self._step} of {self._total}")
        elif self._untrained is not None:
            self._total = self._planned_steps(self._untrained)
            save()  # from now on the number of steps is what it is, whatever happens
            report(f"{self._total} steps fit into {self._config.budget}")
        self._untrained = None
        progress = _Progress(self._config, self._step, self._total, self._batches.per_epoch)
        self._watch.start()
        while self._step < self._total:
            loss = self._learn(self._learner, self._step, self._total)
            self._loss_sum = self._loss_sum + loss
            self._loss_count += 1
            self._step += 1
            if scalars is not None and leads and self._step % _SCALARS_EVERY == 0:
                self._tell(scalars, float(loss))
            halt = self._workers.any(stop())
            done = self._step == self._total
            if self._step % self._batches.per_epoch == 0 or done:
                self._end_of_epoch(measure, scalars if leads else None)
                save()
            elif halt:
                save()
            if line := progress.line(self._step, loss, always=halt or done):
                report(line)
            if halt and not done:
                report("stopped and saved; run the same command again to go on from here")
                raise KeyboardInterrupt
        self._watch.stop()
        self._learner.finish()
        return Fitted(
            steps=self._total,
            epochs=round(self._total / self._batches.per_epoch, 3),
            seconds=self._watch.seconds,
            cpu_seconds=self._watch.cpu_seconds,
            history=tuple(self._history),
        )

    def _learn(self, learner: Learner, step: int, total: int) -> Tensor:
        batch = self._batches(step)
        rng = sample_rng(self._config, 3, step, self._workers.rank)
        torch.manual_seed(int(rng.integers(2**63)))  # for layers that draw, such as dropout
        return learner.learn(
            step, total, lambda: self._loss_of(learner.part, batch, rng, step, total)
        )

    def _planned_steps(self, part: nn.Module) -> int:
        """How many steps the budget is good for, by a trial of some steps on a copy."""
        budget = self._config.budget_cpu_s
        assert budget is not None  # asked for by the one caller
        self._watch.start()
        learner = Learner(part, self._config, self._workers)
        for step in range(TRIAL_STEPS):
            if step == _TRIAL_WARM_UP:
                before = time.process_time()
            self._learn(learner, step, TRIAL_STEPS)
        each = (time.process_time() - before) / (TRIAL_STEPS - _TRIAL_WARM_UP)
        self._watch.stop()
        left = budget - self._watch.cpu_seconds
        if left < each:
            raise ConfigError(
                f"budget_cpu_s is {budget:g}, but {TRIAL_STEPS} steps alone took"
                f" {self._watch.cpu_seconds:.1f} s, expected more"
            )
        return int(left / each)

    def _end_of_epoch(self, measure: Measure | None, scalars: Scalars | None) -> None:
        self._watch.stop()
        accuracy = None
        if measure is not None:
            with self._learner.averaged() as part:
                accuracy = measure(part)
        steps = self._step - (self._history[-1].steps if self._history else 0)
        spent = self._watch.seconds - (self._history[-1].seconds if self._history else 0.0)
        loss = float(self._loss_sum) / max(1, self._loss_count)
        self._history.append(Epoch(self._step, loss, self._watch.seconds, accuracy))
        self._loss_sum, self._loss_count = 0.0, 0
        if scalars is not None:
            speed = steps * self._config.batch_size / max(spent, 1e-9)
            scalars.add_scalar("speed/images_per_s", speed, self._step)
            scalars.add_scalar("loss/epoch", loss, self._step)
            if accuracy is not None:
                scalars.add_scalar("accuracy/held_out", accuracy, self._step)
        self._watch.start()

    def _tell(self, scalars: Scalars, loss: float) -> None:
        config = self._config
        rate = learning_rate(
            config.schedule, self._step - 1, self._total, config.peak_rate, warm_up=config.warm_up
        )
        scalars.add_scalar("loss/step", loss, self._step)
        scalars.add_scalar("rate", rate, self._step)

    def _fingerprint(self, identity: str) -> str:
        """Settings, data and whatever else a checkpoint belongs to."""
        known = {"data": self._data.name, "inputs": len(self._data), "identity": identity}
        return json.dumps(
            {**json.loads(self._config.to_json()), **known, "workers": self._workers.size},
            sort_keys=True,
        )

    def _state(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "total": self._total,
            "seconds": self._watch.seconds,
            "cpu_seconds": self._watch.cpu_seconds,
            "loss_sum": float(self._loss_sum),
            "loss_count": self._loss_count,
            "history": [asdict(epoch) for epoch in self._history],
            "learner": self._learner.state(),
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        self._step, self._total = saved["step"], saved["total"]
        self._watch = _Stopwatch(saved["seconds"], saved["cpu_seconds"])
        self._loss_sum, self._loss_count = saved["loss_sum"], saved["loss_count"]
        self._history = [Epoch(**epoch) for epoch in saved["history"]]
        self._learner.restore(saved["learner"])


class _Stopwatch:
    """Seconds on the wall and of the processor, while it runs."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self._wall, self._cpu = seconds, cpu_seconds
        self._since: tuple[float, float] | None = None

    def start(self) -> None:
        self._since = time.monotonic(), time.process_time()

    def stop(self) -> None:
        self._wall, self._cpu = self.seconds, self.cpu_seconds
        self._since = None

    @property
    def seconds(self) -> float:
        return self._wall + (time.monotonic() - self._since[0] if self._since else 0.0)

    @property
    def cpu_seconds(self) -> float:
        return self._cpu + (time.process_time() - self._since[1] if self._since else 0.0)


class _Progress:
    """A line every ten seconds: where we are, how fast, how long yet."""

    def __init__(self, config: TrainConfig, first: int, total: int, per_epoch: int) -> None:
        self._config, self._first = config, first
        self._total, self._per_epoch = total, per_epoch
        self._started = self._told = time.monotonic()

    def line(self, step: int, loss: Tensor, *, always: bool) -> str | None:
        """The line after ``step`` steps, if it is time for one; only then the loss is fetched."""
        now = time.monotonic()
        if now - self._told < 10 and not always:
            return None
        self._told = now
        rate = (step - self._first) / max(now - self._started, 1e-9)
        epochs = -(-self._total // self._per_epoch)
        return (
            f"epoch {(step - 1) // self._per_epoch + 1}/{epochs}, step {step}/{self._total},"
            f" loss {float(loss):.3f}, {rate * self._config.batch_size:.0f} images/s,"
            f" {clock((self._total - step) / rate)} left"
        )


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop after the running step; a second one ends the program at once."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)

"""Training by several processes, on one machine or several, started by Ray Train.

Ray places the workers, starts ``torch.distributed`` among them and takes all down when one fails.
What they do is :func:`edge.train.train`, the same as one process alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datamix.errors import ConfigError, DataMixError
from edge.settings import TrainConfig


@dataclass(frozen=True, slots=True)
class Task:
    """What each worker is told.

    Attributes:
        config: the settings.
        dataset: its name.
        data: its folder, on every machine; None for what ``DATAMIX_DATA`` says there.
        output: the bundle's folder, absolute, where worker 0 runs.
        tensorboard: folder for TensorBoard's files, likewise; None for none.
    """

    config: TrainConfig
    dataset: str
    data: str | None
    output: str
    tensorboard: str | None = None


def train_together(task: Task, workers: int, address: str | None = None) -> None:
    """Train with several workers and wait for them; lines of progress come from worker 0.

    The same call goes on from the last epoch after an interruption. Each worker gets an equal share
    of every batch, so that a batch is the same as one worker's would be.

    Args:
        task: what to train.
        workers: how many; each takes ``threads`` processors, or a GPU.
        address: a running Ray cluster, ``auto`` or ``host:port``; by default one on this machine.

    Raises:
        ConfigError: settings that do not fit the workers, or Ray Train is not installed.
        DataMixError: a worker failed.
    """
    _check(task, workers)
    import ray

    # Asked for by no line of this program; and a machine's own settings come first.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise ConfigError(
            f"Ray Train cannot be imported ({error}), expected datamix-cluster[workers]"
        ) from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, include_dashboard=False, log_to_driver=True)
    config = task.config
    folder = Path(task.output)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=config.device == "cuda",
            resources_per_worker={"CPU": config.threads},
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.with_name(f"{folder.name}.training") / "ray"),
            # Nothing to try again by itself: the same command goes on, from the last epoch.
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray has several, and they carry whole tracebacks
        raise DataMixError(f"a worker failed: {_cause(error)}") from None
    finally:
        if ours:
            ray.shutdown()


def _check(task: Task, workers: int) -> None:
    """What would otherwise fail in every worker at once."""
    config = task.config
    if workers < 2:
        raise ConfigError(f"workers is {workers}, expected at least 2")
    if config.batch_size % workers:
        raise ConfigError(
            f"batch_size is {config.batch_size}, expected a multiple of the {workers} workers"
        )
    if config.budget_cpu_s is not None:
        raise ConfigError("budget_cpu_s is given with several workers, expected epochs")
    if Path(task.output).exists():
        raise ConfigError(f"{task.output} exists already, expected a new folder for the bundle")


def _cause(error: BaseException) -> str:
    """The innermost error, on one line."""
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, Mapping) and failures:
        error = failures[min(failures)]
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _work(settings: Mapping[str, Any]) -> None:
    """What one worker does."""
    from edge.data import load_dataset
    from edge.train import train
    from edge.workers import ProcessGroup

    task: Task = settings["task"]
    training = load_dataset(task.dataset, "train", task.data)
    test = load_dataset(task.dataset, "test", task.data)
    group = ProcessGroup()
    scalars = None
    if task.tensorboard is not None and group.rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        scalars = SummaryWriter(task.tensorboard)
    try:
        train(
            task.config,
            training,
            test,
            Path(task.output),
            report=partial(print, flush=True),
            scalars=scalars,
            workers=group,
        )
    finally:
        if scalars is not None:
            scalars.close()

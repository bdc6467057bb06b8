"""One run: a network, trained by its method."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datamix.errors import ConfigError
from datamix.models import build
from edge.accuracy import accuracy
from edge.batches import Batch, held_out
from edge.data import Dataset
from edge.fit import Fitted, Report, Scalars, fit
from edge.loss import Loss
from edge.methods import METHODS
from edge.mixtures import Mixing, logits_of
from edge.networks import architecture_for, untrained
from edge.schedules import curriculum
from edge.settings import TrainConfig
from edge.weights import digest, load
from edge.workers import Workers


def check_fit(config: TrainConfig, data: Dataset) -> None:
    """Refuse settings that the data does not fit.

    Raises:
        ConfigError: another shape or number of classes, or blocks that the method cannot use.
    """
    with torch.device("meta"):
        model = build(architecture_for(config.method, config.architecture))
    if data.preprocessing.input_shape != model.input_shape:
        raise ConfigError(
            f"{data.name} has inputs of {data.preprocessing.input_shape},"
            f" {config.architecture.name} expects {model.input_shape}"
        )
    if len(data.class_names) != model.classes:
        raise ConfigError(
            f"{data.name} has {len(data.class_names)} classes,"
            f" {config.architecture.name} has {model.classes} outputs"
        )


def edge_only(config: TrainConfig) -> TrainConfig:
    """The same run without a cloud: same budget, same stem but for a projection before sending."""
    options = {k: v for k, v in config.architecture.options.items() if k != "sent_width"}
    architecture = replace(config.architecture, options=options)
    return replace(
        config, method="edge-only", architecture=architecture, noise_sigma=0.0, teacher=None
    )


def on_cpu(config: TrainConfig) -> TrainConfig:
    """The same settings for what is done after training."""
    return replace(config, device="cpu", precision="float32", channels_last=False)


def mixing_of(config: TrainConfig) -> Mixing | None:
    """How features travel when the network is used; None where they are not mixed."""
    if not METHODS[config.method].mixed:
        return None
    return Mixing(config.group_size, config.law, config.noise_sigma)


def fit_method(
    config: TrainConfig,
    training: Dataset,
    checkpoint: Path,
    *,
    report: Report,
    stop: Callable[[], bool],
    scalars: Scalars | None = None,
    workers: Workers | None = None,
) -> tuple[nn.Module, Fitted]:
    """Train a network by ``config.method``; see :func:`edge.fit.fit`.

    Returns:
        The network in eval mode on the CPU, and what its training took.
    """
    torch.set_num_threads(config.threads)
    learnt, aside = held_out(training, config.validate)
    method = METHODS[config.method]
    teacher: nn.Module | None = None
    identity = ""
    if config.teacher is not None:
        teacher, identity = load(config.teacher).to(config.device), digest(config.teacher)
    loss = Loss(
        config.label_smoothing, config.teacher_weight if teacher else 0.0, config.temperature
    )

    def loss_of(
        part: nn.Module, batch: Batch, rng: np.random.Generator, step: int, total: int
    ) -> Tensor:
        mixing = mixing_of(config) if method.mixes else None
        if mixing is not None:
            mixing = replace(mixing, strength=curriculum(step, total, config.curriculum))
        with torch.no_grad():
            theirs = teacher(batch.inputs) if teacher else None
        return loss(logits_of(part, batch.inputs, mixing, rng), batch.labels, theirs)

    def measure(part: nn.Module) -> float:
        assert aside is not None  # passed on only where it is not
        return accuracy(part, aside, config, mixing_of(config))

    part = untrained(config.method, config.architecture, config.seed)
    with _repeatable(config.deterministic):
        fitted = fit(
            part,
            loss_of,
            config,
            learnt,
            checkpoint,
            report=report,
            stop=stop,
            measure=None if aside is None else measure,
            scalars=scalars,
            workers=workers,
            identity=identity,
        )
    return part, fitted


@contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """Make torch refuse what varies from run to run, for as long as the context lasts."""
    if not wanted:
        yield
        return
    # cuBLAS reads it when it starts: without it torch refuses its products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]

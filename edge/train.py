"""Train a split model and save it as a bundle. Read it from the top to the bottom.

    config, data -> fit the model -> fit the edge-only baseline -> measure -> bundle

The loop is :mod:`edge.fit`; what is learnt from is :mod:`edge.methods`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datamix.bundle import ArchitectureSpec, BoundedSpec, Manifest, save_bundle
from datamix.errors import ConfigError
from datamix.models import SplitModel, count_flops
from edge.accuracy import accuracy
from edge.data import Dataset
from edge.evaluate import evaluate
from edge.fit import Fitted, Report, Scalars
from edge.laws import draw
from edge.methods import METHODS
from edge.mixtures import Mixing, apply
from edge.networks import architecture_for
from edge.preprocess import preprocessor
from edge.runs import check_fit, edge_only, fit_method, on_cpu
from edge.settings import TrainConfig
from edge.splitting import choose
from edge.weights import keep
from edge.workers import Alone, Workers

WEIGHTS = "weights.pt"
_SPLIT_INPUTS = 1000  # to choose how two operators would serve the network


def train(
    config: TrainConfig,
    training: Dataset,
    test: Dataset,
    output: Path,
    *,
    report: Report = print,
    stop: Callable[[], bool] = lambda: False,
    scalars: Scalars | None = None,
    workers: Workers | None = None,
) -> Manifest | None:
    """Train, measure on ``test``, and save a bundle to the new folder ``output``.

    Checkpoints live in ``<output>.training/`` until the bundle is saved; the same call goes on
    from there. ``test`` is used for the figures in the manifest and for no choice.

    A network of the methods ``unmixed`` and ``edge-only`` is none that a device could mix for: its
    weights are kept in ``output``, for a student's ``teacher``, and there is no bundle.

    Args:
        config: the settings.
        training: inputs to learn from.
        test: inputs to measure with.
        output: the bundle's folder; must not exist.
        report: gets a line of progress every ten seconds.
        stop: asked after every step; True saves a checkpoint and ends the run.
        scalars: gets figures of the model's training for plots.
        workers: those who train with us; number 0 writes.

    Returns:
        The manifest; None where there is no bundle, and to workers other than number 0.

    Raises:
        ConfigError: ``output`` exists, settings and data that do not fit each other, or a
            checkpoint of others.
        KeyboardInterrupt: ``stop`` said so; the checkpoint is saved.
    """
    workers = workers or Alone()
    if workers.rank:
        report = _silent
    if output.exists():
        raise ConfigError(f"{output} exists already, expected a new folder for the bundle")
    check_fit(config, training)
    checkpoints = output.with_name(output.name + ".training")
    if workers.rank == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)

    def run(settings: TrainConfig, title: str) -> tuple[nn.Module, Fitted]:
        return fit_method(
            settings,
            training,
            checkpoints / f"{title}.pt",
            report=lambda line: report(f"{title}: {line}"),
            stop=stop,
            scalars=scalars if settings is config else None,
            workers=workers,
        )

    if not METHODS[config.method].mixed:
        part, _ = run(config, config.method)
        if workers.rank == 0:
            output.mkdir(parents=True)
            keep(output / WEIGHTS, part, config.method, config.architecture)
            report(f"accuracy {accuracy(part, test, on_cpu(config), None):.2%}")
            shutil.rmtree(checkpoints)
        return None
    model, fitted = run(config, "through-the-cloud")
    baseline, edge_fitted = run(edge_only(config), "edge-only")
    if workers.rank:
        return None
    edge_accuracy = accuracy(baseline, test, on_cpu(config), None)
    assert isinstance(model, SplitModel)  # every method that is used on mixtures has a cloud
    manifest = save_trained(
        config, model, training, test, output, edge_accuracy, fitted, edge_fitted
    )
    shutil.rmtree(checkpoints)
    return manifest


def _silent(line: str) -> None:
    """What workers other than number 0 report."""


# ------------------------------------------------------------------ measure and save


def measure_tolerance(model: SplitModel, data: Dataset, group_size: int, seed: int) -> float:
    """Twice the largest error that mixing and float16 put on any block's de-mixed output.

    Relative to ``max(1, |value|)``, over up to 4,096 inputs; ``model`` in eval mode. Errors of
    earlier rounds are carried on, as they are on a device. Where a block isn't linear its
    cross-talk is no error of the arithmetic, so the same mixtures without rounding are the
    reference there.
    """
    rng = np.random.default_rng((seed, 2))
    n = min(4096, len(data)) // group_size * group_size
    if n == 0:
        raise ConfigError(f"{len(data)} inputs are fewer than one group of {group_size}")
    inputs = preprocessor(data.preprocessing)(data.inputs[:n])
    worst = 0.0
    with torch.inference_mode():
        exact = rounded = model.stem(torch.from_numpy(inputs))
        for index, block in enumerate(model.blocks):
            if index:
                bridge = model.bridges[index - 1]
                exact, rounded = bridge(exact), bridge(rounded)
            pair = draw("haar", rng, n // group_size, group_size)
            a, back = (torch.from_numpy(matrices) for matrices in pair)
            sent = apply(a, rounded).half().float()
            rounded = apply(back, block(sent).half().float())
            exact = block(exact) if model.linear else apply(back, block(apply(a, exact)))
            worst = max(worst, float(((rounded - exact).abs() / exact.abs().clamp(min=1)).max()))
    return min(1.0, max(1e-6, 2 * worst))


def save_trained(
    config: TrainConfig,
    model: SplitModel,
    training: Dataset,
    test: Dataset,
    output: Path,
    edge_accuracy: float,
    fitted: Fitted,
    edge_fitted: Fitted,
) -> Manifest:
    """Save a draft, evaluate it from disk as anybody would, save the bundle with the figures.

    Args:
        config: settings of the training.
        model: what it trained.
        training: what it learnt from.
        test: inputs to measure with.
        output: the bundle's new folder.
        edge_accuracy: of the edge-only baseline.
        fitted: what the training took.
        edge_fitted: what the baseline's took.
    """
    flops = count_flops(model, group_size=config.group_size)
    metrics = {
        "accuracy_edge_only": edge_accuracy,
        "edge_flops_share": flops.edge_share,
        "edge_flops_share_collapsed": flops.edge_share_collapsed,
        "epochs": fitted.epochs,
        "seed": float(config.seed),
        "training_images": float(len(training)),
        "training_seconds": round(fitted.seconds, 1),
        "training_seconds_edge_only": round(edge_fitted.seconds, 1),
        "test_images": float(len(test)),
    }
    if config.noise_sigma:
        metrics["noise_sigma"] = config.noise_sigma
    if fitted.history and fitted.history[-1].accuracy is not None:
        metrics["accuracy_validation"] = fitted.history[-1].accuracy
    tolerance = measure_tolerance(model, training, config.group_size, config.seed)
    bounded = BoundedSpec(sigma=config.noise_sigma) if config.method == "bounded" else None
    split = None
    if model.linear and bounded is None:
        some = test.inputs[: min(_SPLIT_INPUTS, len(test))]
        split = choose(model, preprocessor(test.preprocessing)(some))
    architecture = architecture_for(config.method, config.architecture)

    def save(path: Path, **measured: float) -> Manifest:
        return save_bundle(
            path,
            model,
            name=config.name,
            version=config.version,
            mode="bounded" if config.method == "bounded" else "mix",
            group_size=config.group_size,
            architecture=ArchitectureSpec(
                name=architecture.name, options=dict(architecture.options)
            ),
            preprocessing=training.preprocessing,
            class_names=training.class_names,
            tolerance=float(f"{tolerance:.2g}"),
            metrics={**measured, **metrics},
            split=split,
            bounded=bounded,
        )

    # The bundle's own evaluation counts one class per input.
    if test.multilabel:
        settings = on_cpu(config)
        mixing = Mixing(config.group_size, noise_sigma=config.noise_sigma, wire="float16")
        return save(
            output,
            accuracy_unmixed=accuracy(model, test, settings, None),
            accuracy_mixed=accuracy(model, test, settings, mixing),
        )
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "draft")
        found = evaluate(Path(folder) / "draft", test, threads=config.threads, seed=config.seed)
    return save(
        output, accuracy_unmixed=found.accuracy_unmixed, accuracy_mixed=found.accuracy_mixed
    )

"""Train a split model and save it as a bundle. Read it from the top to the bottom.

    config, data -> fit the model -> fit the edge-only baseline -> measure -> bundle

Everything random in step ``s`` is drawn from (seed, s), and the learning rate is a function of
``s``: a checkpoint needs the step, the weights and the optimizer's state, nothing else, and a run
that was interrupted anywhere goes on bit for bit as if it had not been (same machine, same number
of threads).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from datamix.bundle import ArchitectureSpec, Manifest, save_bundle
from datamix.errors import ConfigError
from datamix.models import Architecture, SplitModel, build, count_flops
from edge.data import Dataset
from edge.evaluate import evaluate

Report = Callable[[str], None]
Logits = Callable[[Tensor, np.random.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run; the defaults are the recipe of the shipped bundle (docs/training.md).

    Attributes:
        name: of the bundle.
        version: of the bundle.
        architecture: see :func:`datamix.models.build`.
        mode: written to the manifest.
        group_size: K, inputs mixed together.
        epochs: passes over the training data, for the model and for the baseline alike.
        batch_size: images per step; a multiple of ``group_size`` when mixing.
        peak_rate: highest learning rate of the one-cycle schedule.
        weight_decay: AdamW's.
        shift: images are moved by up to so many pixels each way.
        flip: half of the images are mirrored.
        mix_in_training: mix each batch in training; None: only where a block isn't linear.
        seed: of everything random in training.
        threads: torch's; part of the config because another number rounds differently.
    """

    name: str = "fashion-mnist-mix"
    version: str = "1"
    architecture: Architecture = field(
        default_factory=lambda: Architecture("convnet", {"n_blocks": 2})
    )
    mode: Literal["mix", "bounded", "split"] = "mix"
    group_size: int = 4
    epochs: int = 12
    batch_size: int = 256
    peak_rate: float = 3e-3
    weight_decay: float = 0.05
    shift: int = 1
    flip: bool = True
    mix_in_training: bool | None = None
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        for key in ("group_size", "epochs", "batch_size", "threads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}, expected at least 1")
        if not self.peak_rate > 0:
            raise ConfigError(f"peak_rate is {self.peak_rate}, expected more than 0")
        if not 0 <= self.shift <= 8:
            raise ConfigError(f"shift is {self.shift}, expected 0 to 8 pixels")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected at least 0")
        if self.mix_in_training and self.batch_size % self.group_size:
            raise ConfigError(
                f"batch_size is {self.batch_size}, expected a multiple of"
                f" group_size {self.group_size} to mix in training"
            )


def train(
    config: TrainConfig,
    training: Dataset,
    test: Dataset,
    output: Path,
    *,
    report: Report = print,
    stop: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Train, measure on ``test``, and save a bundle to the new folder ``output``.

    Checkpoints live in ``<output>.training/`` until the bundle is saved; the same call goes on
    from there. ``test`` is used for the figures in the manifest and for no choice.

    Args:
        config: the settings.
        training: images to learn from.
        test: images to measure with.
        output: the bundle's folder; must not exist.
        report: gets a line of progress every ten seconds.
        stop: asked after every step; True saves a checkpoint and ends the run.

    Raises:
        ConfigError: ``output`` exists, or a checkpoint of other settings or data.
        KeyboardInterrupt: ``stop`` said so; the checkpoint is saved.
    """
    if output.exists():
        raise ConfigError(f"{output} exists already, expected a new folder for the bundle")
    torch.set_num_threads(config.threads)
    model = _seeded(config)
    if training.preprocessing.input_shape != model.input_shape:
        raise ConfigError(
            f"{training.name} has images of {training.preprocessing.input_shape},"
            f" {config.architecture.name} expects {model.input_shape}"
        )
    mixing = not model.linear if config.mix_in_training is None else config.mix_in_training
    if mixing and config.batch_size % config.group_size:
        raise ConfigError(
            f"batch_size is {config.batch_size}, expected a multiple of"
            f" group_size {config.group_size}, because this model is trained mixed"
        )

    checkpoints = output.with_name(output.name + ".training")
    checkpoints.mkdir(parents=True, exist_ok=True)

    def logits(inputs: Tensor, rng: np.random.Generator) -> Tensor:
        # Linear blocks commute with mixing, so the mixed loss *is* the unmixed one: mixing in
        # training would cost time and teach nothing. Others learn to live with the cross-talk.
        if mixing:
            return mixed_logits(model, inputs, rng, config.group_size)
        output: Tensor = model(inputs)
        return output

    def run(part: nn.Module, title: str, forward: Logits) -> float:
        return fit(
            part,
            forward,
            config,
            training,
            checkpoints / f"{title}.pt",
            report=lambda line: report(f"{title}: {line}"),
            stop=stop,
        )

    seconds = run(model, "through-the-cloud", logits)
    other = _seeded(config)
    baseline = nn.Sequential(other.stem, other.edge_head())
    edge_seconds = run(baseline, "edge-only", lambda inputs, _: baseline(inputs))

    edge_only = _accuracy(baseline.eval(), test)
    manifest = _save(config, model.eval(), training, test, output, edge_only, seconds, edge_seconds)
    shutil.rmtree(checkpoints)
    return manifest


def fit(
    part: nn.Module,
    logits: Logits,
    config: TrainConfig,
    data: Dataset,
    checkpoint: Path,
    *,
    report: Report,
    stop: Callable[[], bool],
) -> float:
    """Train ``part`` in place with AdamW, one cycle and cross-entropy.

    Goes on from ``checkpoint`` where it exists, writes it after every epoch and when stopped.

    Args:
        part: whose parameters learn.
        logits: (inputs (n, C, H, W), the step's random numbers) -> (n, classes).
        config: the settings.
        data: images to learn from.
        checkpoint: a file, replaced in one step.
        report: gets a line of progress every ten seconds.
        stop: asked after every step.

    Returns:
        Seconds of training, those before an interruption included.
    """
    per_epoch = len(data) // config.batch_size
    if per_epoch < 1:
        raise ConfigError(f"{len(data)} images are fewer than one batch of {config.batch_size}")
    total = per_epoch * config.epochs
    optimizer = torch.optim.AdamW(part.parameters(), weight_decay=config.weight_decay)
    first, seconds = _restore(checkpoint, part, optimizer, config, data)
    if first:
        report(f"going on from step {first} of {total}")
    part.train()
    started = told = time.monotonic()
    for step in range(first, total):
        epoch, batch = divmod(step, per_epoch)
        if step == first or batch == 0:
            order = np.random.default_rng((config.seed, 0, epoch)).permutation(len(data))
        rng = np.random.default_rng((config.seed, 1, step))
        torch.manual_seed(int(rng.integers(2**63)))  # for layers that draw, such as dropout
        chosen = order[batch * config.batch_size : (batch + 1) * config.batch_size]
        inputs = normalise(augment(data.inputs[chosen], rng, config), data)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, total, config.peak_rate)
        loss = functional.cross_entropy(logits(inputs, rng), torch.from_numpy(data.labels[chosen]))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

        done, now = step + 1, time.monotonic()
        halt = stop()
        if done % per_epoch == 0 or halt:
            _store(checkpoint, part, optimizer, config, data, done, seconds + now - started)
        if now - told >= 10 or done == total or halt:
            told = now
            rate = (done - first) / (now - started)
            report(
                f"epoch {epoch + 1}/{config.epochs}, step {done}/{total},"
                f" loss {loss.item():.3f}, {rate * config.batch_size:.0f} images/s,"
                f" {_clock((total - done) / rate)} left"
            )
        if halt and done < total:
            report("stopped and saved; run the same command again to go on from here")
            raise KeyboardInterrupt
    return seconds + time.monotonic() - started


# ------------------------------------------------------------------ pure parts


def one_cycle(step: int, total: int, peak: float) -> float:
    """Learning rate of ``step``: up along a cosine for 30% of the way, then down to almost nothing.

    Smith and Topin, "Super-convergence", arXiv:1708.07120; the shape is that of torch's
    ``OneCycleLR`` with its defaults, as a function of the step instead of an object with a state.
    """
    turn = max(1.0, 0.3 * total - 1)
    start, end = peak / 25, peak / 25e4
    if step <= turn:
        return peak + (start - peak) * (1 + math.cos(math.pi * step / turn)) / 2
    way = (step - turn) / max(1.0, total - 1 - turn)
    return end + (peak - end) * (1 + math.cos(math.pi * way)) / 2


def augment(
    images: npt.NDArray[np.uint8], rng: np.random.Generator, config: TrainConfig
) -> npt.NDArray[np.uint8]:
    """Mirror half of the images and move each by up to ``shift`` pixels; (n, C, H, W) both ways."""
    n, _, height, width = images.shape
    if config.flip:
        mirrored = np.less(rng.random(n), 0.5)
        images = np.where(mirrored.reshape(n, 1, 1, 1), images[..., ::-1], images)
    if config.shift:
        pad = config.shift
        padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        down, right = rng.integers(0, 2 * pad + 1, (2, n, 1, 1))
        rows = down + np.arange(height).reshape(height, 1)
        columns = right + np.arange(width)
        images = padded[np.arange(n).reshape(n, 1, 1), :, rows, columns].transpose(0, 3, 1, 2)
    return images


def normalise(images: npt.NDArray[np.uint8], data: Dataset) -> Tensor:
    """(n, C, H, W) uint8 -> float32, as the device will do it."""
    mean = np.asarray(data.preprocessing.mean, np.float32)[:, None, None]
    std = np.asarray(data.preprocessing.std, np.float32)[:, None, None]
    pixels = np.ascontiguousarray(images).astype(np.float32) / np.float32(255)
    return torch.from_numpy((pixels - mean) / std)


def mixed_logits(
    model: SplitModel, inputs: Tensor, rng: np.random.Generator, group_size: int
) -> Tensor:
    """The paper's training pass: head(A^-1 block(A stem(x))), fresh A per group and round.

    (n, C, H, W) -> (n, classes); n is a multiple of ``group_size``. The coefficients come from
    the run's seed and not from :mod:`edge.mixing`: training data is no secret here, and the run
    must repeat.
    """
    features = model.stem(inputs)
    for index, block in enumerate(model.blocks):
        if index:
            features = model.bridges[index - 1](features)
        a = torch.from_numpy(_haar(rng, len(inputs) // group_size, group_size))
        features = _apply(a.transpose(1, 2), block(_apply(a, features)))
    logits: Tensor = model.head(features)
    return logits


def _haar(rng: np.random.Generator, groups: int, k: int) -> npt.NDArray[np.float32]:
    q, r = np.linalg.qr(rng.standard_normal((groups, k, k)))
    signs = np.sign(np.diagonal(r, axis1=1, axis2=2))
    matrices: npt.NDArray[np.float32] = (q * signs[:, None, :]).astype(np.float32)
    return matrices


def _seeded(config: TrainConfig) -> SplitModel:
    torch.manual_seed(config.seed)
    return build(config.architecture)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# ------------------------------------------------------------------ checkpoints


def _fingerprint(config: TrainConfig, data: Dataset) -> str:
    """Settings and data a checkpoint belongs to."""
    return json.dumps({**asdict(config), "data": data.name, "images": len(data)}, sort_keys=True)


def _store(
    path: Path,
    part: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    data: Dataset,
    step: int,
    seconds: float,
) -> None:
    """Write a checkpoint beside ``path`` and rename it, so that there is always a whole one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as stream:
        torch.save(
            {
                "fingerprint": _fingerprint(config, data),
                "step": step,
                "seconds": seconds,
                "part": part.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
            stream,
        )
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _restore(
    path: Path,
    part: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    data: Dataset,
) -> tuple[int, float]:
    """Load a checkpoint if there is one; the step to go on with, and the seconds spent so far."""
    if not path.exists():
        return 0, 0.0
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        fingerprint, step, seconds = saved["fingerprint"], saved["step"], saved["seconds"]
    except Exception as error:  # torch raises many types on a broken file
        raise ConfigError(f"checkpoint {path} cannot be read: {type(error).__name__}") from None
    if fingerprint != _fingerprint(config, data):
        raise ConfigError(
            f"checkpoint {path} is of a run with other settings or data;"
            " give the same ones, or remove its folder to start anew"
        )
    part.load_state_dict(saved["part"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(step), float(seconds)


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


# ------------------------------------------------------------------ measure and save


def _accuracy(part: nn.Module, data: Dataset) -> float:
    right = 0
    with torch.inference_mode():
        for at in range(0, len(data), 512):
            guesses = part(normalise(data.inputs[at : at + 512], data)).argmax(1).numpy()
            right += int((guesses == data.labels[at : at + 512]).sum())
    return right / len(data)


def measure_tolerance(model: SplitModel, data: Dataset, group_size: int, seed: int) -> float:
    """Twice the largest error that mixing and float16 put on any block's de-mixed output.

    Relative to ``max(1, |value|)``, over up to 4,096 images; ``model`` in eval mode. Errors of
    earlier rounds are carried on, as they are on a device. Where a block isn't linear its
    cross-talk is no error of the arithmetic, so the same mixtures without rounding are the
    reference there.
    """
    rng = np.random.default_rng((seed, 2))
    n = min(4096, len(data)) // group_size * group_size
    if n == 0:
        raise ConfigError(f"{len(data)} images are fewer than one group of {group_size}")
    worst = 0.0
    with torch.inference_mode():
        exact = rounded = model.stem(normalise(data.inputs[:n], data))
        for index, block in enumerate(model.blocks):
            if index:
                bridge = model.bridges[index - 1]
                exact, rounded = bridge(exact), bridge(rounded)
            a = torch.from_numpy(_haar(rng, n // group_size, group_size))
            back = a.transpose(1, 2)
            sent = _apply(a, rounded).half().float()
            rounded = _apply(back, block(sent).half().float())
            exact = block(exact) if model.linear else _apply(back, block(_apply(a, exact)))
            worst = max(worst, float(((rounded - exact).abs() / exact.abs().clamp(min=1)).max()))
    return min(1.0, max(1e-6, 2 * worst))


def _apply(matrices: Tensor, rows: Tensor) -> Tensor:
    """Mix each group of rows (n, C, H, W) with its own matrix of (groups, K, K)."""
    groups = rows.reshape(len(matrices), -1, *rows.shape[1:])
    return torch.einsum("gij,gjchw->gichw", matrices, groups).flatten(0, 1)


def _save(
    config: TrainConfig,
    model: SplitModel,
    training: Dataset,
    test: Dataset,
    output: Path,
    edge_only: float,
    seconds: float,
    edge_seconds: float,
) -> Manifest:
    """Save a draft, evaluate it from disk as anybody would, save the bundle with the figures."""
    flops = count_flops(model, group_size=config.group_size)
    metrics = {
        "accuracy_edge_only": edge_only,
        "edge_flops_share": flops.edge_share,
        "edge_flops_share_collapsed": flops.edge_share_collapsed,
        "epochs": float(config.epochs),
        "seed": float(config.seed),
        "training_images": float(len(training)),
        "training_seconds": round(seconds, 1),
        "training_seconds_edge_only": round(edge_seconds, 1),
        "test_images": float(len(test)),
    }
    tolerance = measure_tolerance(model, training, config.group_size, config.seed)

    def save(path: Path, **measured: float) -> Manifest:
        return save_bundle(
            path,
            model,
            name=config.name,
            version=config.version,
            mode=config.mode,
            group_size=config.group_size,
            architecture=ArchitectureSpec(
                name=config.architecture.name, options=dict(config.architecture.options)
            ),
            preprocessing=training.preprocessing,
            class_names=training.class_names,
            tolerance=float(f"{tolerance:.2g}"),
            metrics={**measured, **metrics},
        )

    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "draft")
        found = evaluate(Path(folder) / "draft", test, threads=config.threads, seed=config.seed)
    return save(
        output, accuracy_unmixed=found.accuracy_unmixed, accuracy_mixed=found.accuracy_mixed
    )

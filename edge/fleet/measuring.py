"""``datamix profile-device``: how long a device's own steps take on this machine, as a profile.

Everything really runs: preprocessing and stem on inputs of the bundle's shape, mixing with fresh
coefficients, the message, de-mixing, bridges and head. Only the cloud is missing: answers of the
right shape are drawn, and what they cost is not counted.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from datamix import wire
from datamix.bundle import Manifest
from datamix.errors import ConfigError
from edge.fleet.profiles import STAGES, DeviceKind, Kinds
from edge.fleet.stages import Array, Stages, TimedDevice, TimedMode
from edge.modes import Mix
from edge.session import Device, infer_group

_WARM_UP = 3  # rounds that are not counted: first calls compile, allocate and fill caches


@dataclass(frozen=True, slots=True)
class Measured:
    """What one device takes, in seconds: medians over the rounds.

    Attributes:
        kind: the medians, as a profile has them.
        spread: per stage, the middle half's width over the median.
        rounds: how many groups were inferred.
    """

    kind: DeviceKind
    spread: dict[str, float]
    rounds: int


def measure(
    device: Device,
    rounds: int,
    *,
    runtime: str,
    machine: str | None = None,
    seed: int = 0,
    clock: Callable[[], float] = perf_counter,
) -> Measured:
    """Infer ``rounds`` groups and time each stage; nothing else should run meanwhile.

    Args:
        device: the parts of a bundle.
        rounds: groups, at least 1; those that warm up come before them.
        runtime: what runs the parts, for the profile's source.
        machine: what this is, for the same; None to look.
        seed: of inputs and answers.
        clock: of stem and messages; what mixing, de-mixing and head take is timed inside.

    Raises:
        ConfigError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}, expected at least 1")
    manifest, generator = device.manifest, np.random.default_rng(seed)
    raw = draw_inputs(manifest, generator)
    taken = [_once(device, raw, generator, clock) for _ in range(_WARM_UP + rounds)][_WARM_UP:]
    times, spread = {}, {}
    for stage in STAGES:
        seconds = [once[stage] for once in taken]
        low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
        times[f"{stage}_s"] = float(f"{statistics.median(seconds):.4g}")
        spread[stage] = (high - low) / middle if middle > 0 else 0.0
    source = (
        f"measured on {machine or processor()} with {runtime}: medians of {rounds} groups of "
        f"{manifest.group_size} inputs of {manifest.name}"
    )
    return Measured(DeviceKind(**times, source=source[:500]), spread, rounds)


def draw_inputs(manifest: Manifest, generator: np.random.Generator) -> Array:
    """Draw one group of raw inputs, as the bundle takes them."""
    preprocessing = manifest.preprocessing
    shape = (manifest.group_size, *preprocessing.raw_shape)
    if preprocessing.kind == "image":
        return generator.integers(0, 256, shape, np.uint8)
    return generator.integers(-(2**15), 2**15, shape, np.int16)


def _once(
    device: Device, raw: Array, generator: np.random.Generator, clock: Callable[[], float]
) -> dict[str, float]:
    """Infer one group; seconds per stage, of mixing, message and de-mixing per round."""
    stages, blocks = Stages(), device.manifest.blocks
    begun_s = clock()
    features = device.stem(device.preprocess(raw))
    stem_s = clock() - begun_s
    inference = infer_group(TimedDevice(device, stages), features, TimedMode(Mix(), stages))
    encode_s, question = 0.0, next(inference)
    while True:
        begun_s = clock()
        wire.encode_request(question.features, request_id="profile-0", block=question.block)
        encode_s += clock() - begun_s
        shape = (len(features), *blocks[question.block].output_shape)
        try:
            question = inference.send(generator.standard_normal(shape, np.float32))
        except StopIteration:
            break
    each = len(blocks)
    return {
        "stem": stem_s,
        "mix": stages.mix_s / each,
        "encode": encode_s / each,
        "demix": stages.demix_s / each,
        "head": stages.head_s,
    }


def write(path: Path, name: str, kind: DeviceKind, link: str | None) -> None:
    """Write a file that ``--profiles`` takes.

    Args:
        path: new or old; its suffix is .yaml or .yml.
        name: of the kind of device.
        kind: what was measured.
        link: name of a built-in kind of link, or None for this machine's own.

    Raises:
        ConfigError: another suffix, a name that is none, or a path that can't be written.
    """
    import yaml
    from pydantic import ValidationError

    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path} ends in {path.suffix!r}, expected .yaml")
    try:
        kinds = Kinds(devices={name: kind}, mixture={f"{name}/{link}" if link else name: 1.0})
    except ValidationError:
        raise ConfigError(
            f"the profile's name is {name!r}, expected letters, digits, '.', '_' and '-'"
        ) from None
    text = yaml.safe_dump(kinds.model_dump(exclude={"links"}), sort_keys=False)
    try:
        path.write_text(f"# Written by `datamix profile-device`; for simulate --profiles.\n{text}")
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}") from None


def table(name: str, found: Measured) -> str:
    """What was measured, as lines for people."""
    lines = [f"{name}: {found.kind.source}"]
    for stage in STAGES:
        seconds = getattr(found.kind, f"{stage}_s")
        lines.append(
            f"  {stage:6} {seconds * 1e3:9.3f} ms, the middle half within {found.spread[stage]:.0%}"
        )
    return "\n".join(lines)


def processor() -> str:
    """This machine's processor, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

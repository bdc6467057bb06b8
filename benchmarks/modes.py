"""What does each mode cost the device: processor time, bytes, and how long an answer takes?

    python -m benchmarks.modes [--json FILE]

*Cost.* One group after the other, stem to head, with the cloud's computation left out of the clock:
what is counted is stem, protecting, encoding, restoring, bridges and head. Split has work ahead of
time: drawing seeds, asking operator B, reading its answers and making the noise.

*Online latency.* The client against two real applications behind HAProxy, one group at a time, from
preprocessed inputs to outputs: mix asks operator A's, split the same one, with masks of operator B
that were all fetched before the clock starts. No mask is fetched while it runs.

Modes take turns within each round, so that a busy machine disturbs them alike; in the second part
after each inference.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import clusters, report
from datamix import wire
from datamix.bundle import load_backbone
from edge.client import Client, ClientConfig
from edge.data import sample_for
from edge.masks import draw_seeds, expand_seeds
from edge.modes import mode_of, wire_dtype
from edge.promises import promise
from edge.runtime import TorchDevice
from edge.session import infer_group
from edge.splitting import local_masks

ROOT = Path(__file__).parents[1]
BUNDLES = ("fashion-mnist-mix", "fashion-mnist-one-round", "speech-commands-mix")
LATENCY_MODES = ("mix", "split")
ROWS_AT_ONCE = 32  # of masks, as edge/masks.py fetches them
ANSWERED: dict[str, Any] = {
    "request_id": "0" * 24,
    "model": "model",
    "model_version": "1",
    "block": 0,
    "queue_s": 0.0,
    "compute_s": 0.0,
    "batch_rows": ROWS_AT_ONCE,
    "close_reason": "idle",
}


def run(bundle: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each mode of the bundle."""
    path = ROOT / "bundles" / bundle
    device = TorchDevice(path)
    manifest, blocks = load_backbone(path)
    size = manifest.group_size
    shapes = [block.input_shape for block in manifest.blocks]
    prepared = device.preprocess(sample_for(manifest.preprocessing).inputs[:size])
    online: dict[str, list[float]] = {mode: [] for mode in manifest.modes}
    ahead: dict[str, list[float]] = {mode: [] for mode in manifest.modes}
    up: dict[str, int] = dict.fromkeys(manifest.modes, 0)
    seeds_up = 0
    for _ in range(rounds):
        for mode in manifest.modes:
            masks, spent_s = None, 0.0
            if mode == "split":
                masks, spent_s = _masks(blocks, shapes, size)
            ahead[mode].append(spent_s)
            dtype = wire_dtype(manifest, mode)
            start_s = time.process_time()
            cloud_s, up[mode] = 0.0, 0
            session = infer_group(device, device.stem(prepared), mode_of(manifest, mode, masks))
            step = next(session)
            try:
                while True:
                    message = wire.encode_request(
                        step.features,
                        request_id="0" * 24,
                        dtype=dtype,
                        block=step.block,
                        step=step.step,
                    )
                    up[mode] += len(message)
                    at_s = time.process_time()
                    rows = torch.from_numpy(wire.decode_request(message).features.astype("f4"))
                    with torch.inference_mode():
                        answer = blocks[step.block](rows).numpy().astype(dtype).astype(np.float32)
                    cloud_s += time.process_time() - at_s
                    step = session.send(answer)
            except StopIteration:
                online[mode].append(time.process_time() - start_s - cloud_s)
    for block in range(len(shapes)):
        seeds = draw_seeds(ROWS_AT_ONCE)
        seeds_up += len(wire.encode_noise_request(seeds, request_id="0" * 24, block=block))
    return [
        {
            "bundle": bundle,
            "mode": mode,
            "bits_per_input": promise(manifest, mode).bits_per_input if mode != "mix" else None,
            "online_cpu_ms": statistics.median(online[mode]) * 1e3,
            "ahead_cpu_ms": statistics.median(ahead[mode]) * 1e3,
            "uplink_bytes": up[mode],
            "seed_bytes": round(seeds_up * size / ROWS_AT_ONCE) if mode == "split" else 0,
            "online_ratio": statistics.median(
                a / b for a, b in zip(online[mode], online["mix"], strict=True)
            ),
            "all_ratio": statistics.median(
                (a + c) / b
                for a, b, c in zip(online[mode], online["mix"], ahead[mode], strict=True)
            ),
            "uplink_ratio": (up[mode] + (seeds_up * size / ROWS_AT_ONCE if mode == "split" else 0))
            / up["mix"],
        }
        for mode in manifest.modes
    ]


def _masks(blocks: Any, shapes: Any, size: int) -> tuple[Any, float]:
    """Masks for a group, and the processor time of what a device does for them.

    Masks are fetched for many rows at once; a group has its share of that.
    """
    spent_s = 0.0
    for index, (block, shape) in enumerate(zip(blocks, shapes, strict=True)):
        start_s = time.process_time()
        seeds = draw_seeds(ROWS_AT_ONCE)
        wire.encode_noise_request(seeds, request_id="0" * 24, block=index)
        noise = torch.from_numpy(expand_seeds(seeds, shape).astype(np.float32))
        spent_s += time.process_time() - start_s
        with torch.inference_mode():
            message = wire.encode_response(block(noise).numpy(), dtype="float32", **ANSWERED)
        start_s = time.process_time()
        if not wire.is_finite(wire.decode_response(message).values()):
            raise RuntimeError("operator B's answer is not finite")
        spent_s += time.process_time() - start_s
    return local_masks(list(blocks), shapes, size), spent_s * size / ROWS_AT_ONCE


class _Prepared(TorchDevice):
    """A device whose inputs are preprocessed already: log-mel takes longer than all the rest, and
    would hide what a mode adds."""

    def preprocess(self, raw: Any) -> Any:
        """Nothing is left to do."""
        return raw


def latency(
    bundle: str, urls: tuple[str, str], rounds: int, inferences: int
) -> dict[str, list[float]]:
    """Median seconds of an inference of one group in each round, for each mode."""
    path = ROOT / "bundles" / bundle
    device = _Prepared(path)
    size = device.manifest.group_size
    raw = sample_for(device.manifest.preprocessing).inputs[: size * inferences]
    inputs = TorchDevice(path).preprocess(raw)
    groups = [inputs[at : at + size] for at in range(0, len(inputs) - size + 1, size)]
    # More than are used in a round, so that the pool is not refilled while the clock runs.
    config = ClientConfig(masks_ahead=2 * len(groups) + 2)

    async def go() -> dict[str, list[float]]:
        medians: dict[str, list[float]] = {mode: [] for mode in LATENCY_MODES}
        options: dict[str, Any] = {"second": urls[1], "allow_same_operator": True}
        async with (
            Client(urls[0], device, mode="mix", config=config) as mix,
            Client(urls[0], device, mode="split", config=config, **options) as split,
        ):
            clients = dict(zip(LATENCY_MODES, (mix, split), strict=True))
            assert split.masks_from is not None
            for number in range(rounds + 1):
                await split.prefetch()
                asked = split.masks_from.requests
                took_s: dict[str, list[float]] = {mode: [] for mode in LATENCY_MODES}
                for index, group in enumerate(groups):
                    for mode in LATENCY_MODES if index % 2 else LATENCY_MODES[::-1]:
                        start_s = time.perf_counter()
                        await clients[mode].infer(group)
                        took_s[mode].append(time.perf_counter() - start_s)
                if split.masks_from.requests != asked:
                    raise RuntimeError("masks were fetched while the clock ran")
                if number:  # the first is for warming up
                    for mode in LATENCY_MODES:
                        medians[mode].append(statistics.median(took_s[mode]))
        return medians

    return asyncio.run(go())


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Median over rounds of the ratio within a round, and its 95% interval by bootstrap."""
    ratios = np.divide(over, under)
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)


def latencies(rounds: int, inferences: int) -> dict[str, dict[str, list[float]]]:
    """:func:`latency` of every bundle, by one pair of applications that serves them all."""
    config = {"bundle": [str(ROOT / "bundles" / bundle) for bundle in BUNDLES], "threads": 1}
    with clusters.start_saying("operators", **config) as said:
        urls = (str(said["url"]), str(said["second"]))
        return {bundle: latency(bundle, urls, rounds, inferences) for bundle in BUNDLES}


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="of the cost")
    parser.add_argument("--latency-rounds", type=int, default=30)
    parser.add_argument("--inferences", type=int, default=50, help="of a mode in such a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [row for bundle in BUNDLES for row in run(bundle, args.rounds)]
    timed = latencies(args.latency_rounds, args.inferences)
    for row in found:
        medians = timed[row["bundle"]].get(row["mode"])
        if medians is not None:
            row["online_p50_ms"] = statistics.median(medians) * 1e3
            row["latency_ratio"] = ratio(medians, timed[row["bundle"]]["mix"])
    rows = [
        {
            "bundle": row["bundle"],
            "mode": row["mode"],
            "online CPU": f"{row['online_cpu_ms']:.2f} ms",
            "ahead CPU": f"{row['ahead_cpu_ms']:.2f} ms",
            "uplink": f"{row['uplink_bytes']:,} bytes",
            "seeds": f"{row['seed_bytes']:,} bytes",
            "online / mix": f"{row['online_ratio']:.2f}",
            "all / mix": f"{row['all_ratio']:.2f}",
            "uplink and seeds / mix": f"{row['uplink_ratio']:.3f}",
            "online p50": f"{row['online_p50_ms']:.2f} ms" if "online_p50_ms" in row else "-",
            "online p50 / mix": "{:.3f} [{:.3f}, {:.3f}]".format(*row["latency_ratio"])
            if "latency_ratio" in row
            else "-",
        }
        for row in found
    ]
    notes = [
        "One group of the bundle's size; medians; ratios of the same round.",
        f"Online p50: of {args.inferences} inferences in each of {args.latency_rounds} rounds, one "
        "after the other, through HAProxy; 95% intervals by bootstrap over rounds.",
    ]
    two = [row for row in found if row["mode"] == "split"]
    worst = max((row["latency_ratio"] for row in two), key=lambda three: three[0])
    figures = {
        "split_online_cpu_over_mix": max(row["online_ratio"] for row in two),
        "split_all_cpu_over_mix": max(row["all_ratio"] for row in two),
        "split_online_p50_over_mix": worst[0],
        "split_online_p50_over_mix_low": worst[1],
        "split_online_p50_over_mix_high": worst[2],
        **{f"online_p50_over_mix_{row['bundle']}": row["latency_ratio"][0] for row in two},
        **{f"uplink_over_mix_{row['bundle']}": row["uplink_ratio"] for row in two},
    }
    report.show("What a mode costs the device", rows, notes, args.json, **figures)


if __name__ == "__main__":
    main()

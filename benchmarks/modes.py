"""What does each mode cost the device: processor time, bytes, online and ahead of time?

    python -m benchmarks.modes [--json FILE]

One group after the other, stem to head, with the cloud's computation left out of the clock: what is
counted is stem, protecting, encoding, restoring, bridges and head. Modes take turns within each
round, so that a busy machine disturbs them alike.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from datamix import wire
from datamix.bundle import load_backbone
from edge.data import sample_for
from edge.masks import draw_seeds, expand_seeds
from edge.modes import mode_of, wire_dtype
from edge.promises import promise
from edge.runtime import TorchDevice
from edge.session import infer_group
from edge.splitting import local_masks

ROOT = Path(__file__).parents[1]
BUNDLES = ("fashion-mnist-mix", "fashion-mnist-one-round", "speech-commands-mix")


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
                        step.features, request_id="0" * 24, dtype=dtype, block=step.block
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
        seeds_up += len(wire.encode_noise_request(draw_seeds(32), request_id="0" * 24, block=block))
    return [
        {
            "bundle": bundle,
            "mode": mode,
            "bits_per_input": promise(manifest, mode).bits_per_input if mode != "mix" else None,
            "online_cpu_ms": statistics.median(online[mode]) * 1e3,
            "ahead_cpu_ms": statistics.median(ahead[mode]) * 1e3,
            "uplink_bytes": up[mode],
            # Seeds travel for 32 rows at once.
            "seed_bytes": round(seeds_up * size / 32) if mode == "split" else 0,
            "online_ratio": statistics.median(
                a / b for a, b in zip(online[mode], online["mix"], strict=True)
            ),
            "all_ratio": statistics.median(
                (a + c) / b
                for a, b, c in zip(online[mode], online["mix"], ahead[mode], strict=True)
            ),
            "uplink_ratio": (up[mode] + (seeds_up * size / 32 if mode == "split" else 0))
            / up["mix"],
        }
        for mode in manifest.modes
    ]


def _masks(blocks: Any, shapes: Any, size: int) -> tuple[Any, float]:
    """Masks for a group, and the processor time of what a device does for them."""
    start_s = time.process_time()
    for shape in shapes:
        expand_seeds(draw_seeds(size), shape)
    spent_s = time.process_time() - start_s
    return local_masks(list(blocks), shapes, size), spent_s


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    found = [row for bundle in BUNDLES for row in run(bundle, args.rounds)]
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
        }
        for row in found
    ]
    notes = ["One group of the bundle's size; medians; ratios of the same round."]
    two = [row for row in found if row["mode"] == "split"]
    figures = {
        "split_online_cpu_over_mix": max(row["online_ratio"] for row in two),
        "split_all_cpu_over_mix": max(row["all_ratio"] for row in two),
        **{f"uplink_over_mix_{row['bundle']}": row["uplink_ratio"] for row in two},
    }
    report.show("What a mode costs the device", rows, notes, args.json, **figures)


if __name__ == "__main__":
    main()

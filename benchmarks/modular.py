"""Shares in a ring beside `split`: exactness, accuracy, bytes and time, for decision 12.

    python -m benchmarks.modular --data DIR --json docs/benchmarks/modular.json

Blocks of plain convolutions, in this process. Accuracy is of the test split. A `proved` range holds
for every input, as features are clamped; a `measured` one is twice the largest output of public
inputs, and what exceeds it comes out wrong.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import environment
from benchmarks.rings import Block, Ring, integer_block, proved
from datamix.bundle import Manifest, read_manifest
from datamix.errors import ConfigError
from datamix.models import SplitModel
from edge.audit.record import open_model
from edge.data import Dataset, load_dataset
from edge.preprocess import preprocessor
from edge.splitting import measure

BUNDLES = Path(__file__).parents[1] / "bundles"
SETS = {"speech-commands-mix": "speech-commands", "fashion-mnist-one-round": "fashion-mnist"}
_CLAMP = 4.0  # datamix.models.layers.Whiten
_ROWS = 250
Row = dict[str, Any]


def features_of(model: SplitModel, inputs: np.ndarray) -> list[torch.Tensor]:
    """What would leave in each round."""
    found = []
    with torch.inference_mode():
        features = model.stem(torch.from_numpy(inputs))
        for index, block in enumerate(model.blocks):
            if index:
                features = model.bridges[index - 1](features)
            found.append(features)
            features = block(features)
    return found


def blocks_of(model: SplitModel, ring: Ring, ranges: str, inputs: np.ndarray) -> list[Block]:
    """The model's blocks in integers.

    Raises:
        ConfigError: a block that is no chain of convolutions, or too few bits.
    """
    made = []
    for block, features in zip(model.blocks, features_of(model, inputs), strict=True):
        largest = proved(block, _CLAMP)
        if ranges == "measured":
            with torch.inference_mode():
                largest = 2 * block(features).abs().amax(dim=(0, 2, 3)).double().numpy()
        made.append(integer_block(block, ring, features[:32], largest, range(2, 15)))
    return made


def two_operators(block: Block, features: np.ndarray) -> np.ndarray:
    """One round, both operators played here."""
    mask = np.stack(
        [block.ring.mask(secrets.token_bytes(32), features.shape[1:]) for _ in features]
    )
    return block.restore(block.evaluate(block.share(features, mask)), block.evaluate(mask))


def compare(
    model: SplitModel, blocks: Sequence[Block], data: Dataset, inputs: int
) -> tuple[float, float, float]:
    """Accuracy of the model and of its integers, and the share of classes that change."""
    prepare = preprocessor(data.preprocessing)
    n = min(inputs, len(data))
    right, exact, changed = 0, 0, 0
    with torch.inference_mode():
        for start in range(0, n, _ROWS):
            prepared = prepare(data.inputs[start : min(start + _ROWS, n)])
            plain = model(torch.from_numpy(prepared)).argmax(1).numpy()
            features = model.stem(torch.from_numpy(prepared)).numpy()
            for index, block in enumerate(blocks):
                if index:
                    features = model.bridges[index - 1](torch.from_numpy(features)).numpy()
                # Masks cancel exactly (tests/test_rings.py), so they would only cost time.
                answer = block.evaluate(block.integers(features))
                features = block.restore(answer, np.zeros_like(answer))
            found = model.head(torch.from_numpy(features)).argmax(1).numpy()
            labels = data.labels[start : start + len(found)]
            right += int((found == labels).sum())
            exact += int((plain == labels).sum())
            changed += int((found != plain).sum())
    return exact / n, right / n, changed / n


def median_s(run: Callable[[], object], times: int = 7) -> float:
    """Median seconds of a call, the first one left out."""
    run()
    found = []
    for _ in range(times):
        begin_s = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin_s)
    return float(np.median(found))


def times(model: SplitModel, blocks: Sequence[Block], inputs: np.ndarray) -> tuple[float, float]:
    """Seconds of all blocks for a group of 4, in float32 and in the ring."""
    features = [one[:4] for one in features_of(model, inputs[:4])]
    shares = [
        block.share(one.numpy(), np.zeros(one.shape, np.int64))
        for block, one in zip(blocks, features, strict=True)
    ]

    def plain() -> None:
        with torch.inference_mode():
            for block, one in zip(model.blocks, features, strict=True):
                block(one)

    def ring() -> None:
        for block, one in zip(blocks, shares, strict=True):
            block.evaluate(one)

    return median_s(plain), median_s(ring)


def uplink_bytes(manifest: Manifest, per_value: float) -> float:
    """Bytes of one input's values to operator A, all rounds."""
    return per_value * sum(int(np.prod(block.input_shape)) for block in manifest.blocks)


def measured(bundle: str, data: Path | None, inputs: int) -> list[Row]:
    """All rows of a bundle."""
    path = BUNDLES / bundle
    manifest, model = read_manifest(path), open_model(path)
    training, test = (load_dataset(SETS[bundle], part, data) for part in ("train", "test"))
    public = preprocessor(training.preprocessing)(training.inputs[slice(0, 500)])
    assert manifest.split is not None
    some = preprocessor(test.preprocessing)(test.inputs[: min(1000, len(test))])
    fit = measure(model, some, manifest.split.sigma, manifest.split.wire_dtype)
    per_value = 4 if manifest.split.wire_dtype == "float32" else 2
    split = {
        "bundle": bundle,
        "scheme": f"split, {manifest.split.wire_dtype}",
        "changed": fit.changed,
        "uplink_bytes": uplink_bytes(manifest, per_value),
    }
    rows: list[Row] = [split]
    print(split, flush=True)
    for bits, ranges in ((16, "measured"), (24, "measured"), (24, "proved"), (32, "proved")):
        row: Row = {"bundle": bundle, "scheme": f"ring of {bits} bits, {ranges}"}
        try:
            blocks = blocks_of(model, Ring(bits), ranges, public)
        except ConfigError as error:
            row["error"] = str(error)
        else:
            exact, right, changed = compare(model, blocks, test, inputs)
            plain_s, ring_s = times(model, blocks, some)
            row |= {
                "accuracy": right,
                "accuracy_unmixed": exact,
                "changed": changed,
                "uplink_bytes": uplink_bytes(manifest, bits / 8),
                "compute_over_float32": ring_s / plain_s,
                "compute_s": ring_s,
                "feature_scales": [block.features_scale for block in blocks],
            }
        rows.append(row)
        print(row, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all bundles whose blocks are chains of convolutions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder of data sets; else DATAMIX_DATA")
    parser.add_argument("--inputs", type=int, default=2000, help="of the test split, at most")
    parser.add_argument("--bundles", default=",".join(SETS), help="with commas")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [
        row for name in given.bundles.split(",") for row in measured(name, given.data, given.inputs)
    ]
    if given.json is not None:
        given.json.write_text(
            json.dumps({"schema_version": 1, **environment(), "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

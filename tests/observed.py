"""Observations for tests: messages as a device would send them, in settings of a test's choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from datamix import wire
from datamix.bundle import read_manifest
from edge.audit.features import clipped, next_features, round_features
from edge.audit.material import subset
from edge.audit.observation import Message, Observation, Public
from edge.audit.record import open_model
from edge.data import load_sample

Array = npt.NDArray[Any]
BUNDLE = Path(__file__).parents[1] / "bundles" / "fashion-mnist-mix"
Protect = Callable[[Array, int], Array]


def public_of(bundle: Path = BUNDLE, *, group_size: int = 4, gallery: int = 60) -> Public:
    """A bundle's public knowledge; the first rows of the shipped sample are the gallery."""
    data = load_sample("fashion-mnist")
    rest = subset(data, np.arange(gallery, len(data)))
    return Public(
        read_manifest(bundle).model_copy(update={"group_size": group_size}),
        open_model(bundle),
        rest,
        data.inputs[slice(0, gallery)],
        data.labels[:gallery].astype(np.int64),
    )


def haar(size: int, rng: np.random.Generator) -> Array:
    """A Haar orthogonal matrix from a seeded generator, for tests alone."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diagonal(r)))


def mixed(rng: np.random.Generator) -> Protect:
    """What leaves in the mode mix."""

    def protect(features: Array, block: int) -> Array:
        flat = features.reshape(len(features), -1)
        return (haar(len(features), rng) @ flat).reshape(features.shape)

    return protect


def noisy(rng: np.random.Generator, sigma: float, *, mix: bool = False) -> Protect:
    """What leaves in the mode bounded (mixed) or split (not)."""
    turn = mixed(rng)

    def protect(features: Array, block: int) -> Array:
        cut = clipped(features)
        sent = turn(cut, block) if mix else cut
        return sent + sigma * rng.standard_normal(sent.shape)

    return protect


def observe(
    public: Public,
    members: Array,
    protect: Protect,
    *,
    mode: str = "mix",
    dtype: wire.Dtype = "float16",
    gap_s: float = 1.0,
) -> Observation:
    """Messages of groups whose members are these rows of the gallery, (groups, K)."""
    messages = []
    for index, rows in enumerate(members):
        features = round_features(public, public.gallery[rows], rounds=1)[0]
        for block in range(len(public.manifest.blocks)):
            request_id, at_s = f"r{index}-{block}", index * gap_s + block * 0.1
            sent = protect(features, block).astype(np.float32)
            up = wire.encode_request(sent, request_id=request_id, dtype=dtype, block=block)
            got = wire.decode_request(up).features.astype(np.float32)
            with torch.no_grad():
                answer = public.model.blocks[block](torch.from_numpy(got)).numpy()
            down = wire.encode_response(
                answer,
                dtype=dtype,
                request_id=request_id,
                model=public.manifest.name,
                model_version=public.manifest.version,
                block=block,
                queue_s=0.001,
                compute_s=0.001,
                batch_rows=len(rows),
                close_reason="full",
            )
            messages.append(Message("A", "up", at_s, up))
            messages.append(Message("A", "down", at_s + 0.01, down))
            if block + 1 < len(public.manifest.blocks):
                features = next_features(public, block, features)
    return Observation(mode, "A", tuple(messages), public)


def found_ratio(scores: Array | None, members: Array) -> float:
    """Share of members among the K best of each group; scores (groups, g)."""
    assert scores is not None
    best = np.argsort(-scores, axis=1)[:, : members.shape[1]]
    hits = [np.isin(row, top).mean() for row, top in zip(members, best, strict=True)]
    return float(np.mean(hits))

"""A small bundle for all modes, made-up pictures, and captures of them, for the audit's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edge.audit.attack import ALL_MODES, Budget, Claim
from edge.audit.capture import Capture
from edge.audit.material import Material
from edge.audit.observation import Observation, Public, pictures
from edge.audit.record import open_model, open_sized, record
from edge.audit.truth import Truth
from edge.data import Dataset
from edge.session import Device
from tests.exported import edit, write_bundle


@dataclass(frozen=True)
class Setting:
    bundle: Path
    device: Device
    material: Material
    public: Public

    def record(self, mode: str = "mix", groups: int = 5, seed: int = 0) -> tuple[Capture, Truth]:
        return record(self.bundle, self.device, mode, self.material, groups, seed=seed)

    def view(self, capture: Capture, operator: str = "A") -> Observation:
        which = next(found for found in capture.operators() if found == operator)
        return Observation(capture.header.mode, which, capture.of(which), self.public)


def setting(folder: Path, items: int = 40) -> Setting:
    torch.set_num_threads(1)
    bundle = folder / "small"
    write_bundle(bundle)
    edit(
        bundle,
        lambda m: m.update(
            split={"sigma": 200.0, "wire_dtype": "float32", "tolerance": 0.05},
            bounded={"sigma": 0.5},
        ),
    )
    device = open_sized(bundle, None)
    manifest = device.manifest
    rng = np.random.default_rng(0)
    shape = manifest.preprocessing.raw_shape
    # Smooth pictures: a few waves each, so that they are alike and different as real ones are.
    coarse = rng.random((2 * items, shape[0], 4, 4))
    grow = np.kron(coarse, np.ones((1, 1, shape[1] // 4, shape[2] // 4)))
    raw = (255 * grow).astype(np.uint8)
    labels = rng.integers(0, len(manifest.class_names), 2 * items)
    training = Dataset(
        "made-up",
        raw[items:],
        labels[items:],
        manifest.class_names,
        manifest.preprocessing,
    )
    material = Material("made-up", training, raw[:items], labels[:items])
    public = Public(
        manifest, open_model(bundle), training, material.gallery, material.gallery_labels
    )
    return Setting(bundle, device, material, public)


@dataclass(frozen=True)
class Cheat:
    """Told the truth by its test, which no attack is: if it does not win, scoring is broken."""

    tell: Callable[[], Truth]
    name: str = "cheat"
    title: str = "knows"
    modes: frozenset[str] = ALL_MODES
    operators: frozenset[str] = frozenset({"A", "B"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        public, victims = observation.public, self.tell().victims[:, ::-1]  # any order will do
        groups, size = victims.shape
        named = np.zeros((groups, size, len(public.gallery)))
        np.put_along_axis(named, victims[:, :, None], 1, axis=2)
        members = named.max(axis=1)
        return Claim(
            inputs=pictures(public.manifest.preprocessing, public.gallery)[victims],
            gallery_scores=named,
            attributes=public.gallery_labels[victims],
            pairs=members @ members.T,
            notes="told",
        )

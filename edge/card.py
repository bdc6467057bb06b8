"""The model card of a bundle: what it is, how good, at what price, from what, for what not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from datamix.bundle import BACKBONE, DEVICE, Manifest
from datamix.models import Architecture, SplitModel, block_shapes, build, count_flops
from datamix.models.costs import bytes_on_wire
from edge.evaluate import Evaluation
from edge.measurement import edge_only_flops
from edge.promises import promise

CARD = "MODEL_CARD.md"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a bundle comes from.

    Attributes:
        dataset: name of the data set.
        commands: to make it again, in order.
        commit: of the code that trained it.
        cpu_seconds: of training the network.
        machine: that did it.
        versions: of Python and packages.
    """

    dataset: str
    commands: tuple[str, ...]
    commit: str
    cpu_seconds: float
    machine: str
    versions: Mapping[str, str]


_DATA: Mapping[str, tuple[str, str]] = {
    "fashion-mnist": (
        "Sorts 28x28 grey images of clothes into ten classes.",
        "Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv:1708.07747), MIT licence, (c) 2017 Zalando SE:"
        " `edge/samples/LICENSE`. 60,000 images to learn from, 10,000 to test, the original split.",
    ),
    "speech-commands": (
        "Tells ten spoken commands and other words apart, one second of sound at 16 kHz.",
        "Speech Commands v0.02 (Warden, arXiv:1804.03209), CC BY 4.0, by Pete Warden / Google:"
        " `edge/samples/LICENSE-speech-commands`. Only its canonical *test* set was to be had; it"
        " was split anew by speaker (docs/data.md), so these figures do not compare with published"
        " ones, and a network that learnt from some 3,000 clips is worse than it could be.",
    ),
    "cifar10": (
        "Sorts 32x32 colour pictures into ten classes.",
        "CIFAR-10 (Krizhevsky 2009); no licence is stated for it: for research only.",
    ),
}
_PRIVACY = (
    "Plain mixing is **obfuscation, not protection**. Whoever holds the mixtures of one group can"
    " separate them again (source separation on their gradients works well; docs/privacy.md)."
    " Don't send data through it that the cloud must not see."
)


def _privacy(manifest: Manifest) -> str:
    if manifest.mode == "mix":
        return _PRIVACY
    promised = promise(manifest)
    return f"{promised.text}. Known break: {promised.known_break} (docs/privacy.md)."


def card(manifest: Manifest, found: Evaluation, origin: Origin, sizes: Mapping[str, int]) -> str:
    """The card as Markdown.

    Args:
        manifest: the bundle's.
        found: its evaluation on the test split.
        origin: where it comes from.
        sizes: bytes of its files by name.
    """
    about, licence = _DATA.get(origin.dataset, ("", f"{origin.dataset}: see docs/data.md."))
    edge_only = found.accuracy_edge_only
    spec = manifest.architecture
    with torch.device("meta"):  # shapes are enough
        model = build(Architecture(spec.name, spec.options))
    alone = f"edge only: no cloud, the same stem, {edge_only_flops(model) / 1e6:.2f} M FLOPs"
    lines = [
        f"# {manifest.name}, version {manifest.version}",
        "",
        f"{about} The cloud computes {_rounds(found.rounds)} on mixtures of"
        f" {manifest.group_size} inputs. It exists to show and test the system; it is no product.",
        "",
        "## Privacy",
        "",
        _privacy(manifest),
        "",
        "## Figures",
        "",
        f"| {found.n:,} test inputs | accuracy |",
        "|---|---|",
        f"| through the cloud: mixed, float16 on the wire | {found.accuracy_mixed:.2%} |",
        f"| the same network unmixed | {found.accuracy_unmixed:.2%} |",
        f"| {alone} | {'not measured' if edge_only is None else f'{edge_only:.2%}'} |",
        "",
        "| class | accuracy, mixed |",
        "|---|---|",
        *(f"| {name} | {share:.1%} |" for name, share in found.accuracy_by_class.items()),
        "",
        "One training, one seed: another would differ by some tenths of a point.",
        "",
        *_costs(manifest, model, sizes),
        "",
        "## How it was made",
        "",
        "```",
        *origin.commands,
        "```",
        "",
        f"At commit {origin.commit}, {origin.cpu_seconds:.0f} s of processor time for the network"
        f" ({origin.machine}; {', '.join(f'{k} {v}' for k, v in origin.versions.items())})."
        " Test inputs decided nothing in this training; the recipe was found in trials that did"
        " look at them (docs/decisions/0009).",
        "",
        "## Data and licence",
        "",
        licence,
        "",
        "The weights: Apache-2.0, like the rest of the repository.",
        "",
    ]
    return "\n".join(lines)


def _rounds(rounds: int) -> str:
    return "one linear block" if rounds == 1 else f"{rounds} linear blocks in as many rounds"


def _costs(manifest: Manifest, model: SplitModel, sizes: Mapping[str, int]) -> list[str]:
    flops = count_flops(model, group_size=manifest.group_size)
    sent = bytes_on_wire(block_shapes(model), "float16")
    parts = (
        f"stem {flops.stem / 1e6:.2f}, bridges {sum(flops.bridges) / 1e6:.2f},"
        f" head {flops.head / 1e6:.2f}, mixing {flops.mixing / 1e6:.2f}"
    )
    return [
        "| per input | |",
        "|---|---|",
        f"| FLOPs on the device | {flops.edge / 1e6:.2f} M ({parts}): {flops.edge_share:.1%},"
        f" {flops.edge_share_collapsed:.1%} against collapsed blocks |",
        f"| FLOPs in the cloud | {flops.cloud / 1e6:.2f} M |",
        f"| on the wire | {sent:,} bytes of float16, both ways, without framing,"
        f" in {len(manifest.blocks)} round trip{'s' if len(manifest.blocks) > 1 else ''} |",
        f"| weights | {sizes[DEVICE] / 1e6:.2f} MB on the device,"
        f" {sizes[BACKBONE] / 1e6:.2f} MB in the cloud |",
    ]


def write_card(bundle: Path, manifest: Manifest, found: Evaluation, origin: Origin) -> None:
    """Write the card into a bundle's folder."""
    sizes = {file: (bundle / file).stat().st_size for file in (DEVICE, BACKBONE)}
    (bundle / CARD).write_text(card(manifest, found, origin, sizes))

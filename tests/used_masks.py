"""Notes of every seed that is drawn and every noise that hides features, for tests that count."""

from __future__ import annotations

from typing import Any

import pytest

from edge import masks, modes


def watch(patch: pytest.MonkeyPatch) -> dict[str, list[bytes]]:
    """What this process uses from now on, under ``seed`` and ``noise``, as it comes."""
    seen: dict[str, list[bytes]] = {"seed": [], "noise": []}
    draw, share = masks.draw_seeds, modes.share

    def noted_draw(count: int) -> Any:
        drawn = draw(count)
        seen["seed"] += [row.tobytes() for row in drawn]
        return drawn

    def noted_share(clipped: Any, mask: masks.Mask, sigma: float, step: float | None) -> Any:
        seen["noise"].append(mask.noise.tobytes())
        return share(clipped, mask, sigma, step)

    patch.setattr(masks, "draw_seeds", noted_draw)
    patch.setattr(modes, "share", noted_share)
    return seen


def assert_used_once(seen: dict[str, list[bytes]]) -> None:
    """No seed was drawn twice, and no noise hid two groups."""
    for kind, values in seen.items():
        assert values and len(set(values)) == len(values), f"a {kind} was used twice, or none was"

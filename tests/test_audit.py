from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from datamix.errors import ConfigError
from edge.audit.attack import ALL_MODES, Attack, Budget, Claim
from edge.audit.attacks import suite
from edge.audit.attacks.constant import ATTACK
from edge.audit.audit import Outcome, Plan, audit
from edge.audit.capture import Capture
from edge.audit.material import load_material
from edge.audit.observation import Observation
from edge.audit.record import open_sized
from edge.audit.report import read_report, write_report
from edge.audit.truth import Truth
from tests.audited import Cheat, Setting, setting

BUNDLES = Path(__file__).parents[1] / "bundles"


@dataclass(frozen=True)
class Breaks:
    error: type[BaseException] = ValueError
    name: str = "breaks"
    title: str = "does not work"
    modes: frozenset[str] = ALL_MODES
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        raise self.error("broken")


class Notes:
    """Keeps what attacks were given."""

    def __init__(self, modes: frozenset[str] = ALL_MODES) -> None:
        self.name, self.title, self.modes = "notes", "keeps what it gets", modes
        self.operators = frozenset({"A", "B"})
        self.seen: list[tuple[Observation, Budget]] = []

    def run(self, observation: Observation, budget: Budget) -> Claim:
        self.seen.append((observation, budget))
        budget.report("looked")
        return Claim()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return setting(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def recorded(small: Setting) -> Iterator[tuple[Capture, Truth]]:
    yield small.record(groups=12)


def run(
    small: Setting, recorded: tuple[Capture, Truth], plan: Plan, scored: bool = True
) -> Outcome:
    capture, truth = recorded
    return audit(capture, small.public, small.material, truth if scored else None, plan)


def test_rows_of_who_knows_and_of_who_does_not(
    small: Setting, recorded: tuple[Capture, Truth], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    cheat = Cheat(lambda: recorded[1])
    outcome = run(small, recorded, Plan((ATTACK, cheat), json_path=path, tell=lambda _: None))
    assert not outcome.failed and not outcome.interrupted
    by_attack = {
        name: {row.verdict for row in outcome.report.rows if row.attack == name}
        for name in ("constant", "cheat")
    }
    assert by_attack == {"constant": {"at the floor"}, "cheat": {"leaks"}}
    ssim = next(r for r in outcome.report.rows if (r.attack, r.metric) == ("cheat", "ssim"))
    assert ssim.value == pytest.approx(1) and ssim.bound_bits is None and ssim.k == 4
    rows = json.loads(path.read_text())["rows"]
    keys = "attack mode dataset metric value low high floor verdict operator k n seconds bound_bits"
    assert set(keys.split()) <= set(rows[0])
    assert read_report(path) == outcome.report
    shown = {item.attack: item for item in outcome.report.exhibits}
    assert (shown["cheat"].pixels("recovered") == shown["cheat"].pixels("original")).all()
    assert (shown["constant"].pixels("recovered") != shown["constant"].pixels("original")).any()


def test_each_operator_sees_its_own_and_its_bound(small: Setting) -> None:
    recorded = small.record("split", groups=4)
    notes = Notes()
    cheat = Cheat(lambda: recorded[1])
    outcome = run(small, recorded, Plan((notes, cheat), tell=lambda _: None))
    for observation, _ in notes.seen:
        assert {message.operator for message in observation.messages} == {observation.operator}
    assert [observation.operator for observation, _ in notes.seen] == ["A", "B"]
    found = {(row.operator, row.verdict) for row in outcome.report.rows if row.metric == "ssim"}
    (bound,) = {row.bound_bits for row in outcome.report.rows if row.operator == "A"}
    assert bound is not None
    assert found == {("A", f"bounded at {bound:.3g} bits"), ("B", "leaks")}
    assert "operator B nothing" in outcome.report.promise


def test_an_attack_gets_its_share_of_the_time_that_is_left(
    small: Setting, recorded: tuple[Capture, Truth]
) -> None:
    first, second = Notes(), Notes()
    second.name = "more"
    told: list[str] = []
    ticks = count()
    plan = Plan((first, second), 100.0, tell=told.append, clock=lambda: float(next(ticks)))
    run(small, recorded, plan)
    (early,), (late,) = first.seen, second.seen
    assert early[1].seconds == pytest.approx(49.5)
    assert 80 < late[1].seconds < 100  # what the first did not use
    assert early[1].seed == plan.seed
    assert any(line.startswith("[1/2] notes") for line in told)
    assert "  notes: looked" in told


def test_attacks_for_other_modes_are_left_out(
    small: Setting, recorded: tuple[Capture, Truth]
) -> None:
    notes = Notes(frozenset({"split"}))
    assert run(small, recorded, Plan((notes,), tell=lambda _: None)).report.rows == ()
    assert notes.seen == []


def test_an_attack_that_breaks_down_fails_the_audit_and_is_tried_again(
    small: Setting, recorded: tuple[Capture, Truth], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    attacks: tuple[Attack, ...] = (Breaks(), ATTACK)
    outcome = run(small, recorded, Plan(attacks, json_path=path, tell=lambda _: None))
    assert outcome.failed
    row = outcome.report.rows[0]
    assert (row.verdict, row.value, row.notes) == ("failed", None, "ValueError: broken")
    assert len(outcome.report.rows) == 6
    notes = Notes()
    notes.name = "breaks"  # the same attack, mended
    again = run(small, recorded, Plan((notes, ATTACK), json_path=path, tell=lambda _: None))
    assert not again.failed and len(notes.seen) == 1


def test_ctrl_c_keeps_what_is_done_and_goes_on_from_there(
    small: Setting, recorded: tuple[Capture, Truth], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    stops = Breaks(KeyboardInterrupt, name="stops")
    outcome = run(small, recorded, Plan((ATTACK, stops), json_path=path, tell=lambda _: None))
    assert outcome.interrupted
    assert read_report(path) == outcome.report
    assert {row.attack for row in outcome.report.rows} == {"constant"}
    notes = Notes()
    never = Breaks(AssertionError, name="constant")
    again = run(small, recorded, Plan((never, notes), json_path=path, tell=lambda _: None))
    assert not again.failed and len(notes.seen) == 1
    assert again.report.rows[: len(outcome.report.rows)] == outcome.report.rows


def test_rows_of_another_capture_are_not_taken_up(
    small: Setting, recorded: tuple[Capture, Truth], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    plan = Plan((ATTACK,), json_path=path, tell=lambda _: None)
    run(small, recorded, plan)
    with pytest.raises(ConfigError, match="another audit"):
        run(small, small.record(groups=12), plan)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not a report"):
        run(small, recorded, plan)


def test_without_truth_nothing_is_scored(small: Setting, recorded: tuple[Capture, Truth]) -> None:
    plan = Plan((ATTACK,), tell=lambda _: None)
    (row,) = run(small, recorded, plan, scored=False).report.rows
    assert (row.verdict, row.value, row.n) == ("not scored", None, 0)


def test_what_does_not_belong_together_is_refused(
    small: Setting, recorded: tuple[Capture, Truth]
) -> None:
    capture, truth = recorded
    plan = Plan((ATTACK,), tell=lambda _: None)
    header = capture.header
    for change in ({"model": "other"}, {"model_version": "2"}, {"group_size": 8}):
        other = Capture(header.model_copy(update=change), capture.messages)
        with pytest.raises(ConfigError):
            audit(other, small.public, small.material, truth, plan)
    with pytest.raises(ConfigError, match="another gallery"):
        run(small, (capture, replace(truth, gallery_sha256="00" * 32)), plan)
    for seconds in (0.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError):
            Plan((ATTACK,), seconds)


def test_a_report_cannot_hold_what_json_cannot(tmp_path: Path, small: Setting) -> None:
    outcome = run(small, small.record(groups=2), Plan((), tell=lambda _: None))
    with pytest.raises(ValueError):
        write_report(tmp_path / "a.json", replace(outcome.report, budget_s=float("inf")))
    assert not (tmp_path / "a.json").exists()


def test_a_budget_runs_out() -> None:
    now = [5.0]
    budget = Budget(10.0, seed=3, clock=lambda: now[0])
    assert budget.left_s() == 10 and not budget.expired()
    now[0] = 16.0
    assert budget.left_s() == 0 and budget.expired()
    assert budget.rng().random() == np.random.default_rng(3).random()


def test_the_suite_is_found_by_name() -> None:
    assert ATTACK in suite()
    assert suite(("constant",)) == (ATTACK,)
    names = [attack.name for attack in suite()]
    assert names == sorted(set(names))
    with pytest.raises(ConfigError, match="'nothing'"):
        suite(("nothing",))


@pytest.mark.parametrize(
    ("bundle", "items"), [("fashion-mnist-mix", 200), ("speech-commands-mix", 88)]
)  # noqa: E501
def test_samples_are_cut_into_public_data_and_a_gallery(bundle: str, items: int) -> None:
    manifest = open_sized(BUNDLES / bundle, None).manifest
    material = load_material(manifest, "sample", seed=1)
    assert len(material.gallery) == len(material.gallery_labels) == items
    public = np.asarray(material.training.inputs[:])
    inside = {row.tobytes() for row in material.gallery}
    assert len(inside & {row.tobytes() for row in public}) == 0
    assert material.digest() == load_material(manifest, "sample", seed=1).digest()
    assert material.digest() != load_material(manifest, "sample", seed=2).digest()


def test_victims_of_a_group_differ(small: Setting) -> None:
    victims = small.material.victims(50, 4, 0)
    assert all(len(set(members)) == 4 for members in victims)
    assert (victims == small.material.victims(50, 4, 0)).all()
    for groups, size in ((0, 4), (1, 0), (1, 41)):
        with pytest.raises(ConfigError):
            small.material.victims(groups, size, 0)

import json
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix.errors import ConfigError, DataMixError
from edge.data import load_sample
from edge.search.budget import Costs, DeviceBudget
from edge.search.children import Tick, run_here
from edge.search.halving import Halving
from edge.search.holdout import hold_out
from edge.search.journal import Journal
from edge.search.pareto import dominates
from edge.search.plot import plot
from edge.search.report import refused_lines, table, to_json, train_command, write_json
from edge.search.run import Pace, Race, SearchResult, afford, draw
from edge.search.space import Candidate, SearchSpace
from edge.search.trial import Measured, Outcome, Trainer, Trial
from tests.fake_trainer import accuracy, broken, known

GRID = SearchSpace("fake", (("width", (4, 8, 16, 32)), ("rounds", (1, 2, 3))))


def fake_cost(candidate: Candidate) -> Costs:
    options = dict(candidate.options)
    width, rounds = int(options["width"]), int(options.get("rounds", 1))
    if width == 13:
        raise ConfigError("width is 13, expected another number")
    return Costs(100 * width, 1000 * width, 1000 * width, 8 * width * rounds, rounds, 4 * width)


class Runner:
    """Runs trials here and keeps which; stops like Ctrl-C after so many of them."""

    def __init__(self, trainer: Trainer = known, most: int = 10**9) -> None:
        self.trainer, self.most = trainer, most
        self.trials: list[Trial] = []

    def __call__(self, trials: Sequence[Trial], tick: Tick) -> Generator[Outcome, None, None]:
        for trial in trials:
            tick()
            if len(self.trials) == self.most:
                raise KeyboardInterrupt
            self.trials.append(trial)
            yield from run_here(self.trainer, [trial])


def race(
    path: Path,
    runner: Runner,
    *,
    budget: DeviceBudget = DeviceBudget(),  # noqa: B008  frozen
    halving: Halving = Halving(1.0, 3, 2),  # noqa: B008  frozen
    grid: SearchSpace = GRID,
    report: Callable[[str], None] = lambda line: None,
) -> SearchResult:
    within, refused = afford(grid, budget, fake_cost)
    with Journal(path, {"data": "fake"}) as journal:
        return Race(halving, 0, runner, journal, grid.label, report).result(within, refused)


def test_the_race_ends_with_the_best_network_and_trains_few_for_long(tmp_path: Path) -> None:
    runner = Runner()
    result = race(tmp_path / "t", runner)
    assert GRID.label(result.chosen.candidate) == "width=32 rounds=3"
    assert [trial.seconds for trial in runner.trials] == [1.0] * 12 + [2.0] * 6 + [4.0] * 3
    assert len({trial for trial in runner.trials}) == 21
    assert len(result.entries) == 12
    assert [entry.rung for entry in result.entries] == [3] * 3 + [2] * 3 + [1] * 6
    for entry in result.entries:
        trial = Trial(entry.candidate, entry.seconds, 0)
        assert entry.measured.accuracy == accuracy(trial)


def test_the_front_is_of_finalists_and_beats_every_other_one(tmp_path: Path) -> None:
    result = race(tmp_path / "t", Runner(), halving=Halving(1.0, 1, 2))
    finalists = [entry for entry in result.entries if entry.rung == result.chosen.rung]
    assert len(finalists) == 12
    assert result.chosen in result.front
    for entry in finalists:
        beaten = any(dominates(other.point, entry.point) for other in finalists)
        assert (entry in result.front) != beaten


def test_the_cheap_end_of_the_front_stays_in_the_race(tmp_path: Path) -> None:
    result = race(tmp_path / "t", Runner())
    cheapest = min(entry.costs.edge_flops for entry in result.entries)
    assert min(entry.costs.edge_flops for entry in result.front) == cheapest


def test_nothing_over_the_budget_is_ever_trained(tmp_path: Path) -> None:
    grid = SearchSpace("fake", (("width", (4, 13, 32)), ("rounds", (1, 3))))
    runner = Runner()
    budget = DeviceBudget(round_trips=1, edge_flops=1000)
    result = race(tmp_path / "t", runner, budget=budget, grid=grid)
    assert {grid.label(t.candidate) for t in runner.trials} == {"width=4 rounds=1"}
    reasons = {grid.label(one.candidate): one.reason for one in result.refused}
    assert len(reasons) == 5
    assert reasons["width=13 rounds=1"] == "width is 13, expected another number"
    assert reasons["width=4 rounds=3"] == "round_trips 3, expected at most 1"
    assert "edge_flops 3,200, expected at most 1,000" in reasons["width=32 rounds=1"]
    lines = refused_lines(result.refused * 3, grid.label)
    assert lines[-1] == "refused: 5 more"
    assert lines[0] == "refused: width=4 rounds=3: round_trips 3, expected at most 1"


def test_a_budget_that_nobody_keeps_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of 12 architectures can be used; .* edge_flops"):
        race(tmp_path / "t", Runner(), budget=DeviceBudget(edge_flops=1))


@settings(max_examples=25, deadline=None)
@given(stops=st.lists(st.integers(0, 8), max_size=6))
def test_a_race_that_was_stopped_goes_on_where_it_was(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int]
) -> None:
    path = tmp_path_factory.mktemp("race") / "t"
    trained: list[Trial] = []
    for most in stops:
        runner = Runner(most=most)
        try:
            race(path, runner)
        except KeyboardInterrupt:
            assert len(runner.trials) == most
        trained += runner.trials
    last = Runner()
    result = race(path, last)
    trained += last.trials
    assert len(set(trained)) == len(trained) == 21
    straight = race(path.with_name("straight"), Runner())
    assert result == straight


def test_another_budget_uses_what_is_trained_already(tmp_path: Path) -> None:
    race(tmp_path / "t", Runner())
    again = Runner()
    race(tmp_path / "t", again, budget=DeviceBudget(round_trips=2), halving=Halving(1.0, 1, 2))
    assert again.trials == []


def test_failures_are_told_dropped_and_tried_again(tmp_path: Path) -> None:
    grid = SearchSpace("fake", (("width", (1, 2, 8, 16)),))
    lines: list[str] = []
    runner = Runner(broken)
    result = race(
        tmp_path / "t", runner, grid=grid, halving=Halving(1.0, 2, 2), report=lines.append
    )
    assert [one.problem for one in result.failed] == [
        "the data are not there, expected some",
        "ZeroDivisionError: division by zero",
    ]
    assert {grid.label(entry.candidate) for entry in result.entries} == {"width=8", "width=16"}
    assert "failed: width=2: ZeroDivisionError: division by zero" in lines
    again = Runner(known)
    assert race(tmp_path / "t", again, grid=grid, halving=Halving(1.0, 2, 2)).failed == ()
    assert {grid.label(t.candidate) for t in again.trials if t.seconds == 1} == {
        "width=1",
        "width=2",
    }


def test_a_rung_without_a_success_is_an_error(tmp_path: Path) -> None:
    grid = SearchSpace("fake", (("width", (1, 2)),))
    with pytest.raises(DataMixError, match="all 2 trainings of rung 1 failed.*ZeroDivision"):
        race(tmp_path / "t", Runner(broken), grid=grid)


def test_progress_says_how_far_who_leads_and_how_long(tmp_path: Path) -> None:
    lines: list[str] = []
    race(tmp_path / "t", Runner(), report=lines.append)
    assert lines[0] == "rung 1/3, 1 CPU s each: 0 of 12 trained, about 0:00:36 left"
    assert lines[-1].startswith("rung 3/3, 4 CPU s each: 3 of 3 trained, best 88.89%")
    assert "width=32 rounds=3, about 0:00:00 left" in lines[-1]


def test_the_time_that_is_left_counts_down_while_a_training_runs(tmp_path: Path) -> None:
    lines: list[str] = []
    now_s = [1000.0]

    def slowly(trials: Sequence[Trial], tick: Tick) -> Generator[Outcome, None, None]:
        for trial in trials:
            tick()
            now_s[0] += 7.0
            tick()
            now_s[0] += 60.0  # longer than planned: never below zero
            tick()
            yield from run_here(known, [trial])

    grid = SearchSpace("fake", (("width", (1, 2)),))
    within, refused = afford(grid, DeviceBudget(), fake_cost)
    with Journal(tmp_path / "t", {"data": "fake"}) as journal:
        race = Race(Halving(10.0, 1, 2), 0, slowly, journal, clock=lambda: now_s[0])
        race.report = lines.append
        race.result(within, refused)
    left = [line.rsplit("about ")[1] for line in lines[:3]]
    assert left == ["0:00:20 left", "0:00:13 left", "0:00:00 left"]


def test_the_pace_is_that_of_finished_trials() -> None:
    pace = Pace()
    assert pace.wall_s(100, 2) == 50
    trial = Trial(Candidate("fake", ()), 10.0, 0)
    pace.add(Outcome(trial, Measured(0.5, 10), None, 12.0, 30.0))
    pace.add(Outcome(trial, None, "it failed", 0.0, 1000.0))
    assert pace.wall_s(100, 2) == 150


@given(most=st.integers(1, 20), seed=st.integers(0, 10))
def test_a_draw_is_a_part_in_order_and_depends_on_the_seed_alone(most: int, seed: int) -> None:
    within, _ = afford(GRID, DeviceBudget(), fake_cost)
    drawn = draw(within, most, seed)
    assert len(drawn) == min(most, len(within))
    assert [one for one in within if one in drawn] == drawn
    assert drawn == draw(within, most, seed)
    assert draw(within, None, seed) == within


# ------------------------------------------------------------------ what is told and written


def test_the_report_shows_both_shares_and_json_holds_everything(tmp_path: Path) -> None:
    result = race(tmp_path / "t", Runner(), budget=DeviceBudget(round_trips=2))
    lines = table(result, GRID.label).splitlines()
    assert lines[0].split()[:6] == ["options", "accuracy", "edge", "FLOPs", "share", "collapsed"]
    assert lines[1].startswith("chosen  width=32 rounds=2")
    assert "9.1%" in lines[1]
    assert "4 refused untrained" in lines[-1]
    write_json(to_json(result, {"seed": 0}), tmp_path / "search.json")
    found = json.loads((tmp_path / "search.json").read_text())
    assert found["seed"] == 0
    assert found["chosen"] == found["trained"][0]
    assert [e for e in found["trained"] if e["on_front"]] == found["front"]
    assert len(found["refused"]) == 4
    assert found["chosen"]["options"] == {"rounds": 2, "width": 32}
    assert {path.name for path in tmp_path.iterdir()} == {"t", "search.json"}


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_plot_is_the_same_file_for_the_same_outcome(tmp_path: Path, kind: str) -> None:
    result = race(tmp_path / "t", Runner())
    plot(result, tmp_path / f"a.{kind}", "title")
    plot(result, tmp_path / f"b.{kind}", "title")
    first = (tmp_path / f"a.{kind}").read_bytes()
    assert first == (tmp_path / f"b.{kind}").read_bytes()
    if kind == "svg":
        for text in (b"chosen", b"3 round trips", b"1 round trip", b"dropped", b"title"):
            assert text in first
    with pytest.raises(ConfigError, match="expected a name that ends in"):
        plot(result, tmp_path / "a.gif", "title")


def test_the_command_is_one_that_a_shell_reads_back() -> None:
    import shlex

    candidate = Candidate("bridgenet", (("rounds", 2), ("widths", "64,96")))
    command = train_command(
        candidate,
        dataset="cifar10",
        directory="/my data",
        preset="cifar10",
        method="linear",
        group_size=8,
        output="out/bundle",
    )
    words = shlex.split(command)
    assert words[:4] == ["datamix", "train", "--output", "out/bundle"]
    assert words[words.index("--data") + 1] == "/my data"
    assert [words[i + 1] for i, word in enumerate(words) if word == "--option"] == [
        "rounds=2",
        "widths=64,96",
    ]


# ------------------------------------------------------------------ the journal


def outcome(width: int = 4) -> Outcome:
    trial = Trial(Candidate("fake", (("name", "a,b"), ("width", width))), 1.5, 3)
    return Outcome(trial, Measured(0.25, 8), None, 1.0, 2.0)


def test_a_journal_reads_back_what_was_added(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {"data": "x", "sizes": (1, 2)}) as journal:
        journal.add(outcome(4))
        journal.add(outcome(8))
        journal.add(Outcome(outcome(16).trial, None, "it failed", 0.0, 0.0))
    with Journal(tmp_path / "j", {"data": "x", "sizes": (1, 2)}) as journal:
        assert list(journal.done.values()) == [outcome(4), outcome(8)]


@given(cut=st.integers(0, 400))
def test_a_line_cut_anywhere_loses_that_line_only(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    with Journal(path, {}) as journal:
        journal.add(outcome(4))
        first = path.stat().st_size
        journal.add(outcome(8))
    whole = path.stat().st_size
    end = max(first, whole - 1 - cut)
    os.truncate(path, end)
    with Journal(path, {}) as journal:
        assert list(journal.done.values()) == [outcome(4)]
        journal.add(outcome(16))
    with Journal(path, {}) as journal:
        assert list(journal.done.values()) == [outcome(4), outcome(16)]


@pytest.mark.parametrize("cut", [0, 1, 10, 15])
def test_a_first_line_cut_short_starts_anew(tmp_path: Path, cut: int) -> None:
    (tmp_path / "j").write_text('{"settings": {}}'[:cut])
    with Journal(tmp_path / "j", {}) as journal:
        journal.add(outcome(4))
    with Journal(tmp_path / "j", {}) as journal:
        assert list(journal.done.values()) == [outcome(4)]


def test_one_search_at_a_time(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "j", {}),
        pytest.raises(ConfigError, match="held by another search"),
    ):
        Journal(tmp_path / "j", {})
    with Journal(tmp_path / "j", {}):
        pass


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {"data": "x", "held_out": 0.1}):
        pass
    with pytest.raises(ConfigError, match=r"other settings \(held_out\)"):
        Journal(tmp_path / "j", {"data": "x", "held_out": 0.2})


GOOD = json.dumps(
    {
        "trial": {
            "candidate": {"architecture": "a", "options": [["w", 1]]},
            "seconds": 1,
            "seed": 0,
        },
        "measured": {"accuracy": 0.5, "n": 4},
        "cpu_s": 1,
        "wall_s": 1,
    }
)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "not json\n",
        "[]\n",
        '{"settings": {}}\n{}' + "\n",
        '{"settings": {}}\n[1]' + "\n",
        '{"settings": {}}\nnull' + "\n",
        '{"settings": {}}\n' + GOOD.replace("0.5", "1.5") + "\n",
        '{"settings": {}}\n' + GOOD.replace("0.5", "NaN") + "\n",
        '{"settings": {}}\n' + GOOD.replace('"n": 4', '"n": 0') + "\n",
        '{"settings": {}}\n' + GOOD.replace('["w", 1]', '["w", [1]]') + "\n",
        '{"settings": {}}\n' + GOOD.replace('["w", 1]', '"w"') + "\n",
        '{"settings": {}}\n\x00\xff' + "\n",
        '{"settings": 3}' + "\n",
    ],
)
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "j").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="is no journal of a search"):
        Journal(tmp_path / "j", {})
    assert (tmp_path / "j").read_bytes() == text.encode("latin-1")
    (tmp_path / "j").write_text('{"settings": {}}\n' + GOOD + "\n")
    with Journal(tmp_path / "j", {}) as journal:
        assert len(journal.done) == 1


# ------------------------------------------------------------------ held-out data


@given(share=st.floats(0.001, 0.999), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_held_out_inputs_are_not_learned_from(share: float, seed: int) -> None:
    data = load_sample()
    training, held = hold_out(data, share, seed)
    assert len(training) + len(held) == len(data)
    assert len(held) == min(999, int(np.ceil(share * 1000)))
    both: Any = np.concatenate([training.inputs[:], held.inputs[:]])
    labels = np.concatenate([training.labels, held.labels])
    order = np.lexsort(both.reshape(1000, -1).T)
    theirs = data.inputs[:].reshape(1000, -1)
    expected = np.lexsort(theirs.T)
    assert np.array_equal(both.reshape(1000, -1)[order], theirs[expected])
    assert np.array_equal(labels[order], data.labels[expected])
    assert np.array_equal(training.inputs[np.array([2, 0])], training.inputs[:][[2, 0]])
    assert np.array_equal(held.labels, hold_out(data, share, seed)[1].labels)


def test_no_speaker_is_on_both_sides() -> None:
    data = load_sample("speech-commands")
    training, held = hold_out(data, 0.3, 0)
    assert not set(training.attributes["speaker"]) & set(held.attributes["speaker"])
    assert 0.3 <= len(held) / len(data) < 0.5


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan"), -1.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="held_out is"):
        hold_out(load_sample(), share, 0)

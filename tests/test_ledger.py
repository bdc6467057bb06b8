"""The ledger: sums stay within budgets whoever races, nothing is lost, and what it prints."""

from __future__ import annotations

import json
import math
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from typer.testing import CliRunner

from cluster.cli import app
from datamix.errors import BudgetSpent, ConfigError
from edge.ledger import MAX_BITS, MAX_COUNT, Ledger, Row, Spent, add_up

ROOT = Path(__file__).parents[1]
CHARGE: dict[str, Any] = {
    "inputs": 8,
    "rounds": 2,
    "bundle": "fashion",
    "mode": "split",
    "session": "monday",
}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    head = "import sys; from tests.test_ledger import *; path = Path(sys.argv[1])\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def sums(path: Path) -> dict[str, float]:
    with Ledger(path, budget_bits=None) as ledger:
        return {spent.source: spent.bits for spent in ledger.sources()}


# --- one process ----------------------------------------------------------------------------------


def test_bits_add_up_over_sessions_modes_and_restarts(path: Path) -> None:
    clock = Clock()
    with Ledger(path, budget_bits=None, clock=clock) as ledger:
        ledger.charge("door", 1.5, **CHARGE)
        clock.now = 1010.0
        ledger.charge("door", 2.0, **CHARGE | {"inputs": 1})
        ledger.charge("hall", 0.25, **CHARGE)
    clock.now = 990.0  # somebody set it back
    with Ledger(path, budget_bits=8, clock=clock) as ledger:
        assert ledger.charge("door", 0.5, **CHARGE).bits == 4.0
        ledger.charge("door", 1.0, **CHARGE | {"session": "tuesday"})
        ledger.charge("door", 2.0, **CHARGE | {"session": "tuesday", "mode": "bounded"})
        monday = ("door", "monday", "fashion", "split", 17, 3, 6, 4.0, 0, 990.0, 1010.0, 0.5)
        assert ledger.report() == [
            Row(*monday),
            Row("door", "tuesday", "fashion", "bounded", 8, 1, 2, 2.0, 0, 990.0, 990.0, 0.25),
            Row("door", "tuesday", "fashion", "split", 8, 1, 2, 1.0, 0, 990.0, 990.0, 0.125),
            Row("hall", "monday", "fashion", "split", 8, 1, 2, 0.25, 0, 1010.0, 1010.0, 1 / 32),
        ]
        assert [(spent.source, spent.bits, spent.share) for spent in ledger.sources()] == [
            ("door", 7.0, 0.875),
            ("hall", 0.25, 1 / 32),
        ]
        assert ledger.spent("door") == ledger.sources()[0]
        assert ledger.spent("roof") == Spent("roof", 0.0, 0, 8.0, None)


def test_a_refusal_says_all_and_spends_nothing(path: Path) -> None:
    with Ledger(path, budget_bits=10) as ledger:
        ledger.charge("door", 9.0, **CHARGE)
        with pytest.raises(BudgetSpent) as caught:
            ledger.charge("door", 1.25, **CHARGE | {"session": "tuesday"})
        assert str(caught.value) == (
            "source 'door' has spent 9 bits, asked for 1.25, the budget is 10 bits"
        )
        assert caught.value.status == 403 and not caught.value.retryable
        assert [(row.session, row.bits) for row in ledger.report()] == [("monday", 9.0)]
        assert ledger.charge("door", 1.0, **CHARGE).share == 1  # exactly
        assert ledger.charge("door", 0.0, **CHARGE).bits == 10
        ledger.charge("hall", 10.0, **CHARGE)  # has a budget of its own
        with pytest.raises(BudgetSpent, match="has spent 10 bits, asked for 4.94066e-324"):
            ledger.charge("door", 5e-324, **CHARGE)
    with Ledger(path, budget_bits=5) as ledger, pytest.raises(BudgetSpent, match="budget is 5"):
        ledger.charge("door", 0.0, **CHARGE)


def test_a_mode_without_a_bound_is_counted_and_keeps_no_budget(path: Path) -> None:
    mix = CHARGE | {"mode": "mix"}
    with Ledger(path, budget_bits=1e300) as ledger:
        ledger.charge("hall", 3.0, **CHARGE)
        with pytest.raises(BudgetSpent) as caught:
            ledger.charge("hall", math.inf, **mix)
        assert str(caught.value) == (
            "source 'hall' has spent 3 bits, asked for inf, the budget is 1e+300 bits: "
            "mode 'mix' has no bound, so it cannot keep any budget"
        )
        assert len(ledger.report()) == 1
    with Ledger(path, budget_bits=None) as ledger:
        ledger.charge("door", math.inf, **mix)
        ledger.charge("door", 2.0, **CHARGE)
        spent = ledger.charge("door", math.inf, **mix)
        assert spent == Spent("door", 2.0, 2, None, None)
        assert [(row.mode, row.bits, row.unbounded, row.inputs) for row in ledger.report()[:2]] == [
            ("mix", 0.0, 2, 16),
            ("split", 2.0, 0, 8),
        ]
    with Ledger(path, budget_bits=100) as ledger:  # what is out is out
        with pytest.raises(BudgetSpent, match="spent inf bits in 2 inferences without a bound, as"):
            ledger.charge("door", 0.1, **CHARGE)
        assert ledger.spent("door").share is None
        assert "the budget of 100 bits is not kept" in str(ledger.spent("door").warning)


@pytest.mark.parametrize(("warn_at", "first"), [(0.8, 8), (0.5, 5), (1.0, 10)])
def test_warnings(path: Path, warn_at: float, first: int) -> None:
    with Ledger(path, budget_bits=10, warn_at=warn_at) as ledger:
        said = [ledger.charge("door", 1.0, **CHARGE).warning for _ in range(10)]
    assert [warning is not None for warning in said] == [bits >= first for bits in range(1, 11)]
    assert said[-1] == "source 'door' has spent 10 of 10 bits (100%)"


def test_a_budget_of_nothing(path: Path) -> None:
    with Ledger(path, budget_bits=0) as ledger:
        assert ledger.charge("door", 0.0, **CHARGE).warning == (
            "source 'door' has spent 0 of 0 bits"
        )
        with pytest.raises(BudgetSpent):
            ledger.charge("door", 1e-9, **CHARGE)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"bits": math.nan}, "bits is nan, expected 0 to"),
        ({"bits": -1.0}, "bits is -1.0, expected 0 to"),
        ({"bits": 2 * MAX_BITS}, "bits is .*, expected 0 to"),
        ({"bits": -math.inf}, "bits is -inf, expected 0 to"),
        ({"inputs": 0}, "inputs is 0, expected 1 to"),
        ({"rounds": MAX_COUNT + 1}, "rounds is 2147483648, expected 1 to"),
        ({"rounds": 1.5}, "rounds is 1.5, expected a whole number"),
        ({"source": ""}, "source is '', expected 1 to 200 printable characters"),
        ({"session": "a\x1b[2J"}, "session is 'a.x1b.2J', expected 1 to 200"),
        ({"bundle": "b" * 201}, "bundle is 'bbb.*, expected 1 to 200"),
        ({"mode": None}, "mode is None, expected 1 to 200"),
        ({"mode": "\ud800"}, "mode is .*, expected 1 to 200"),
    ],
)
def test_bad_charges(path: Path, changed: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"source": "door", "bits": 1.0, **CHARGE}
    with Ledger(path, budget_bits=None) as ledger:
        with pytest.raises(ConfigError, match=sentence):
            ledger.charge(**arguments | changed)
        assert ledger.report() == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget_bits": -1}, "budget_bits is -1, expected at least 0 and finite"),
        ({"budget_bits": math.nan}, "budget_bits is nan"),
        ({"budget_bits": math.inf}, "budget_bits is inf"),
        ({"budget_bits": 1, "warn_at": 0}, "warn_at is 0, expected more than 0"),
        ({"budget_bits": 1, "warn_at": 1.1}, "warn_at is 1.1"),
    ],
)
def test_bad_settings(path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Ledger(path, **options)
    assert not path.exists()


# --- sums -----------------------------------------------------------------------------------------

BITS = st.floats(0, MAX_BITS)


@given(BITS, BITS)
def test_a_sum_is_the_least_float_that_is_not_below_it(spent: float, bits: float) -> None:
    total, exact = add_up(spent, bits), Fraction(spent) + Fraction(bits)
    assert Fraction(total) >= exact
    assert total == exact or Fraction(math.nextafter(total, 0)) < exact


def test_a_small_charge_is_not_lost_on_a_large_sum() -> None:
    assert 1e9 + 1e-9 == 1e9 < add_up(1e9, 1e-9)
    assert add_up(1.0, 2.0) == 3.0


class Interleaved(RuleBasedStateMachine):
    """Three ledgers on one file with budgets of their own, charged in any order and reopened."""

    SOURCES = ("door", "hall")

    @initialize(budgets=st.tuples(*[st.none() | st.floats(0, 100)] * 3))
    def open(self, budgets: tuple[float | None, ...]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.db"
        self.budgets = budgets
        self.ledgers = [Ledger(self.path, budget_bits=budget) for budget in budgets]
        self.exact = dict.fromkeys(self.SOURCES, Fraction(0))
        self.unbounded = dict.fromkeys(self.SOURCES, 0)
        self.inferences = 0

    @rule(
        which=st.integers(0, 2),
        source=st.sampled_from(SOURCES),
        session=st.sampled_from(["a", "b"]),
        bits=st.floats(0, 40) | st.floats(0, 1e-3) | st.just(math.inf),
    )
    def charge(self, which: int, source: str, session: str, bits: float) -> None:
        budget = self.budgets[which]
        try:
            self.ledgers[which].charge(source, bits, **CHARGE | {"session": session})
        except BudgetSpent:
            assert budget is not None
            if bits < math.inf and not self.unbounded[source]:
                # Rounded up, so by a whisker it may refuse what would just have fit.
                assert self.exact[source] + Fraction(bits) > Fraction(budget) * (
                    1 - Fraction(1e-12)
                )
            return
        self.inferences += 1
        if bits == math.inf:
            assert budget is None
            self.unbounded[source] += 1
        else:
            self.exact[source] += Fraction(bits)
        if budget is not None:
            assert self.exact[source] <= Fraction(budget)

    @rule(which=st.integers(0, 2))
    def reopen(self, which: int) -> None:
        self.ledgers[which].close()
        self.ledgers[which] = Ledger(self.path, budget_bits=self.budgets[which])

    @invariant()
    def the_file_says_what_happened(self) -> None:
        if not hasattr(self, "ledgers"):
            return
        rows = self.ledgers[0].report()
        assert sum(row.inferences for row in rows) == self.inferences
        for spent in (self.ledgers[1].spent(source) for source in self.SOURCES):
            exact = float(self.exact[spent.source])
            of_rows = math.fsum(row.bits for row in rows if row.source == spent.source)
            assert Fraction(spent.bits) >= self.exact[spent.source]
            assert spent.bits == pytest.approx(exact, rel=1e-12, abs=1e-300)
            assert of_rows == pytest.approx(exact, rel=1e-12, abs=1e-300)
            assert spent.unbounded == self.unbounded[spent.source]

    def teardown(self) -> None:
        for ledger in getattr(self, "ledgers", []):
            ledger.close()
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


# --- several processes ----------------------------------------------------------------------------

RACE = """
done = 0
with Ledger(path, budget_bits=60) as ledger:
    print("ready", flush=True); sys.stdin.readline()
    try:
        while True:
            ledger.charge("door", 1.0, **CHARGE | {"session": sys.argv[2]}); done += 1
    except BudgetSpent:
        print(done)
"""


def test_two_processes_that_race_spend_the_budget_and_no_bit_more(path: Path) -> None:
    running = [run(RACE, path, name) for name in ("left", "right")]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    done = [int(process.communicate(timeout=120)[0]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum(done) == 60
    assert sums(path) == {"door": 60.0}
    with Ledger(path, budget_bits=None) as ledger:
        counted = {row.session: row.inferences for row in ledger.report()}
    assert counted == {
        name: count for name, count in zip(("left", "right"), done, strict=True) if count
    }


def test_threads_that_race_spend_the_budget_and_no_bit_more(path: Path) -> None:
    done: list[int] = []

    def spend(ledger: Ledger) -> None:
        try:
            while True:
                ledger.charge("door", 1.0, **CHARGE)
                done.append(1)
        except BudgetSpent:
            pass

    with Ledger(path, budget_bits=40) as shared, Ledger(path, budget_bits=40) as other:
        threads = [threading.Thread(target=spend, args=(one,)) for one in (shared, shared, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(done) == 40
    assert sums(path) == {"door": 40.0}


def test_a_process_killed_after_its_charge_has_paid(path: Path) -> None:
    code = (
        "ledger = Ledger(path, budget_bits=10); ledger.charge('door', 3.0, **CHARGE)\n"
        "print('charged', flush=True); sys.stdin.readline()"
    )
    process = run(code, path)
    assert process.stdout is not None and process.stdout.readline() == "charged\n"
    process.send_signal(signal.SIGKILL)  # by its id
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    with Ledger(path, budget_bits=10) as ledger:
        assert ledger.spent("door").bits == 3.0
        with pytest.raises(BudgetSpent):
            ledger.charge("door", 8.0, **CHARGE)


def test_killed_at_any_point_no_charge_is_lost(path: Path) -> None:
    """Each line a process prints is a charge that returned; at most one more was under way."""
    code = (
        "ledger = Ledger(path, budget_bits=None)\n"
        "while True: ledger.charge('door', 1.0, **CHARGE); print('.', flush=True)"
    )
    before = 0.0
    for lines in (1, 4, 9):
        process = run(code, path)
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        # Not communicate(): it passes over the lines that readline() has fetched ahead.
        rest = process.stdout.readlines()
        process.communicate(timeout=60)
        after = sums(path)["door"]
        assert 0 <= after - before - lines - len(rest) <= 1
        before = after


# --- files that are none --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE total SET bits = -1.0",
        "UPDATE total SET bits = 9e999",
        "UPDATE total SET bits = 'none'",
        "UPDATE spent SET inferences = 1.5",
        "UPDATE spent SET bits = x'00'",
    ],
)
def test_a_row_that_makes_no_sense(path: Path, change: str) -> None:
    with Ledger(path, budget_bits=None) as ledger:
        ledger.charge("door", 1.0, **CHARGE)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    connection.execute(change)
    connection.commit()
    connection.close()
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="is damaged or no ledger at all: its pages or rows do"):
        Ledger(path, budget_bits=None)
    assert path.read_bytes() == content


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_ledger_is_refused_or_makes_sense(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "ledger.db"
    with Ledger(path, budget_bits=None, clock=Clock()) as ledger:  # the same bytes each time
        ledger.charge("door", 1.0, **CHARGE)
    content = bytearray(path.read_bytes())
    used = [index for index, byte in enumerate(content) if byte]  # elsewhere it says nothing
    for index in data.draw(st.lists(st.sampled_from(used), min_size=1, max_size=3)):
        content[index] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        with Ledger(path, budget_bits=None) as ledger:
            rows, sources = ledger.report(), ledger.sources()
            ledger.charge("door", 1.0, **CHARGE)
    except ConfigError:
        return
    values: list[Row | Spent] = [*rows, *sources]
    for value in values:
        assert value.source.isprintable() and 0 <= value.bits < math.inf
        assert isinstance(value.unbounded, int) and value.unbounded >= 0


def test_a_name_that_would_drive_a_terminal(path: Path) -> None:
    with Ledger(path, budget_bits=None) as ledger:
        ledger.charge("door", 1.0, **CHARGE)
    for table in ("spent", "total"):
        connection = sqlite3.connect(path)
        connection.execute(f"UPDATE {table} SET source = 'a' || char(27) || '[2J'")
        connection.commit()
        connection.close()
    with Ledger(path, budget_bits=None) as ledger:
        for read in (ledger.report, ledger.sources):
            with pytest.raises(ConfigError, match="a name in it is none"):
                read()


def test_the_file_holds_names_and_numbers_only(path: Path) -> None:
    with Ledger(path, budget_bits=None) as ledger:
        ledger.charge("door", 1.0, **CHARGE)
    connection = sqlite3.connect(path)
    columns = {
        name
        for table in ("spent", "total")
        for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")
    }
    connection.close()
    assert columns == {
        *("source", "session", "bundle", "mode", "inputs", "inferences", "rounds", "unbounded"),
        *("bits", "first_s", "last_s"),
    }


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def filled(path: Path) -> Path:
    clock = Clock()
    with Ledger(path, budget_bits=None, clock=clock) as ledger:
        ledger.charge("door [red]", 9.0, **CHARGE)
        ledger.charge("hall", math.inf, **CHARGE | {"mode": "mix", "inputs": 4321})
        clock.now = 1e300
        ledger.charge("hall", 0.5, **CHARGE)
    return path


def test_the_command_prints_tables(filled: Path) -> None:
    done = CliRunner().invoke(app, ["ledger", str(filled), "--budget-bits", "10"])
    assert done.exit_code == 0, done.output
    totals, rows = (part.splitlines() for part in done.output.split("\n\n"))
    assert totals[0].split() == ["source", "bits", "unbounded", "of", "budget"]
    door = (
        "door [red]     9          0      90.0%  source 'door [red]' has spent 9 of 10 bits (90%)"
    )
    assert totals[1] == door
    assert totals[2].startswith("hall         0.5          1             source 'hall' has 1 inf")
    assert [line.split()[:1] for line in rows] == [["source"], ["door"], ["hall"], ["hall"]]
    assert rows[1].endswith("90.0%  1970-01-01 00:16:40  1970-01-01 00:16:40")
    assert "  mix     4,321  " in rows[2]
    assert rows[3].endswith("  1e+300")


def test_the_command_prints_json(filled: Path) -> None:
    done = CliRunner().invoke(app, ["ledger", str(filled), "--json"])
    found = json.loads(done.output, parse_constant=lambda name: pytest.fail(name))
    with Ledger(filled, budget_bits=None) as ledger:
        assert found["rows"] == [asdict(row) for row in ledger.report()]
        assert [source["bits"] for source in found["sources"]] == [9.0, 0.5]
    assert found["budget_bits"] is None
    assert found["sources"][1]["unbounded"] == 1


def test_an_empty_ledger_prints_heads(path: Path) -> None:
    Ledger(path, budget_bits=None).close()
    done = CliRunner().invoke(app, ["ledger", str(path)])
    assert done.exit_code == 0 and len(done.output.splitlines()) == 3


def test_the_command_makes_no_file(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["ledger", str(tmp_path / "none")])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).endswith("none is no file, expected a ledger")
    assert list(tmp_path.iterdir()) == []

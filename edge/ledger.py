"""The privacy ledger: how many bits each input source has given away, and that it stops in time.

A charge is made before anything leaves the device. It is refused where the sum over all sessions
would exceed the budget, and then nothing was spent and nothing may be sent. A charge whose send
fails, or whose process dies, stays: too much on the ledger is harmless, too little is not.

**Why bits add up.** Let U be what a source fed in, and Y_i what left the device in round i, with
noise of its own: Y_i = X_i + sigma Z_i, where X_i may depend on U, on all earlier rounds and on the
cloud's answers to them. By the chain rule I(U; Y_1 ... Y_n) = sum_i I(U; Y_i | Y_1 ... Y_{i-1}).
Whatever came before, a row of X_i has d values of mean square at most 1 (the device scales it), and
Z_i is fresh, so each term is at most the capacity of the Gaussian channel under that constraint,
d/2 log2(1 + 1/sigma^2) bits a row (Cover and Thomas, Elements of Information Theory, chapter 9).
The sum of the bounds therefore bounds all rounds and repeats together, though they are chosen
adaptively; a repeated input is a repeated charge (averaging n noisy copies divides the variance by
n). It is a sum over one source: what two sources have in common counts for each.

The budget is the caller's setting and not in the file: the file says what happened, and its one
home says what may (two processes with two budgets share one sum, and each keeps its own).

The file holds names, counts, bits and times. No input, output, coefficient, seed or noise.
"""

from __future__ import annotations

import math
import operator
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from datamix.errors import BudgetSpent, ConfigError
from edge.closing import Closing
from edge.database import Database, Layout

MAX_NAME_CHARACTERS = 200
MAX_COUNT = 2**31 - 1
MAX_BITS = 2.0**53
"""Of one charge that is not ``math.inf``."""

_COUNT = "INTEGER NOT NULL CHECK (typeof({0}) = 'integer' AND {0} >= 0)"
_REAL = "REAL NOT NULL CHECK (typeof({0}) = 'real' AND {0} >= {1} AND {0} <= 1e300)"
_TEXT = "TEXT NOT NULL CHECK (typeof({0}) = 'text')"
_KEY = ("source", "session", "bundle", "mode")
_COUNTS = ("inputs", "inferences", "rounds", "unbounded")

LAYOUT: Final = Layout(
    what="ledger",
    application_id=0x444D4C47,  # "DMLG"
    version=1,
    statements=(
        "CREATE TABLE spent ("
        + ", ".join(f"{name} {_TEXT.format(name)}" for name in _KEY)
        + ", "
        + ", ".join(f"{name} {_COUNT.format(name)}" for name in _COUNTS)
        + f", bits {_REAL.format('bits', 0)}"
        + "".join(f", {name} {_REAL.format(name, -1e300)}" for name in ("first_s", "last_s"))
        + ", PRIMARY KEY (source, session, bundle, mode)) WITHOUT ROWID",
        # The sum of `spent` by source, so that a charge does not add up years of sessions.
        f"CREATE TABLE total (source {_TEXT.format('source')} PRIMARY KEY, "
        f"unbounded {_COUNT.format('unbounded')}, bits {_REAL.format('bits', 0)}) WITHOUT ROWID",
    ),
    durable=True,
)


@dataclass(frozen=True, slots=True)
class Spent:
    """What one source has spent, over all sessions.

    Attributes:
        source: name of the input source.
        bits: sum of all charges that have a bound, in bits.
        unbounded: inferences in a mode without a bound, which are not in ``bits``.
        budget_bits: the budget that the ledger was opened with, in bits.
        warning: a sentence where the sum is past ``warn_at`` of the budget.
    """

    source: str
    bits: float
    unbounded: int
    budget_bits: float | None
    warning: str | None

    @property
    def share(self) -> float | None:
        """Of the budget; 1 where it is all spent. None without a budget or without a bound."""
        return None if self.unbounded else _share(self.bits, self.budget_bits)


@dataclass(frozen=True, slots=True)
class Row:
    """What one source has spent in one session, with one bundle in one mode.

    Attributes:
        source: name of the input source.
        session: name of the session.
        bundle: name of the bundle.
        mode: what left the device.
        inputs: how many inputs were charged for.
        inferences: charges.
        rounds: trips to the cloud, summed over the inferences.
        bits: sum of all charges that have a bound, in bits.
        unbounded: inferences without a bound, which are not in ``bits``.
        first_s: time of the first charge, seconds since 1970.
        last_s: time of the last charge.
        share: ``bits`` over the budget; None without a budget.
    """

    source: str
    session: str
    bundle: str
    mode: str
    inputs: int
    inferences: int
    rounds: int
    bits: float
    unbounded: int
    first_s: float
    last_s: float
    share: float | None


class Ledger(Closing):
    """The ledger in one file, which several processes may charge at once."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        budget_bits: float | None,
        warn_at: float = 0.8,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the ledger at ``path``, or make it.

        Args:
            path: the file; it is made for its owner only.
            budget_bits: what each source may spend over all sessions, in bits; None for no limit.
            warn_at: the share of the budget from which on a charge comes with a warning, over 0.
            clock: the time, in seconds since 1970.

        Raises:
            ConfigError: a setting makes no sense; or the file is no ledger, damaged, of a newer
                schema, or cannot be read and written.
            Unavailable: another process has held the file for too long.
        """
        if budget_bits is not None and not 0 <= budget_bits < math.inf:  # NaN is neither
            raise ConfigError(f"budget_bits is {budget_bits}, expected at least 0 and finite")
        if not 0 < warn_at <= 1:
            raise ConfigError(f"warn_at is {warn_at}, expected more than 0 and at most 1")
        self.budget_bits = None if budget_bits is None else float(budget_bits)
        self.warn_at = warn_at
        self._clock = clock
        self._database = Database(path, LAYOUT)

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        self._database.close()

    def charge(
        self,
        source: str,
        bits: float,
        *,
        inputs: int,
        rounds: int,
        bundle: str,
        mode: str,
        session: str,
    ) -> Spent:
        """Spend the bits of one inference, before anything of it leaves the device.

        When this returns, the charge is on the disk. It takes a few milliseconds, most of them the
        disk's, so an event loop should call it in a thread.

        Args:
            source: whose inputs they are: a camera, a person; what the budget belongs to.
            bits: the bound on what leaks, of all inputs and rounds of this inference together;
                ``math.inf`` in a mode that has no bound, which no budget allows.
            inputs: how many inputs.
            rounds: how many trips to the cloud.
            bundle: name of the bundle.
            mode: what leaves the device.
            session: a name for this stretch of use, for the report.

        Returns:
            What the source has spent with this charge.

        Raises:
            BudgetSpent: the sum over all sessions would exceed the budget, or has no bound. Nothing
                was spent.
            ConfigError: an argument makes no sense, or the file is damaged or cannot be written.
            Unavailable: another process has held the file for too long.
        """
        key = {"source": source, "session": session, "bundle": bundle, "mode": mode}
        for name, value in key.items():
            _check_name(name, value)
        inputs, rounds = _count("inputs", inputs), _count("rounds", rounds)
        bits = float(bits)
        if not (0 <= bits <= MAX_BITS or bits == math.inf):
            raise ConfigError(f"bits is {bits}, expected 0 to {MAX_BITS:g}, or inf without a bound")
        bounded, unbounded = (0.0, 1) if bits == math.inf else (bits, 0)
        with self._database.transaction() as connection:
            before = self._spent(connection, source)
            self._allow(before, bits, mode)
            now = float(self._clock())
            connection.execute(
                "INSERT INTO spent VALUES (:source, :session, :bundle, :mode, 0, 0, 0, 0, 0.0, "
                ":now, :now) ON CONFLICT DO NOTHING",
                {**key, "now": now},
            )
            where = "WHERE source = :source AND session = :session AND bundle = :bundle AND "
            where += "mode = :mode"
            (of_row,) = connection.execute(f"SELECT bits FROM spent {where}", key).fetchone()
            connection.execute(
                "UPDATE spent SET inputs = inputs + :inputs, inferences = inferences + 1, "
                "rounds = rounds + :rounds, unbounded = unbounded + :unbounded, bits = :bits, "
                f"first_s = min(first_s, :now), last_s = max(last_s, :now) {where}",
                {
                    **key,
                    "inputs": inputs,
                    "rounds": rounds,
                    "unbounded": unbounded,
                    "bits": add_up(of_row, bounded),
                    "now": now,
                },
            )
            after = self._saying(source, add_up(before.bits, bounded), before.unbounded + unbounded)
            connection.execute(
                "INSERT OR REPLACE INTO total (source, unbounded, bits) VALUES (?, ?, ?)",
                (source, after.unbounded, after.bits),
            )
        return after

    def spent(self, source: str) -> Spent:
        """What ``source`` has spent so far, over all sessions; nothing where it is unknown.

        Raises:
            ConfigError: the file is damaged or cannot be read.
            Unavailable: another process has held the file for too long.
        """
        with self._database.transaction() as connection:
            return self._spent(connection, source)

    def sources(self) -> list[Spent]:
        """What each source has spent over all sessions, by name.

        Raises:
            ConfigError: the file is damaged or cannot be read.
            Unavailable: another process has held the file for too long.
        """
        with self._database.transaction() as connection:
            found = connection.execute(
                "SELECT source, bits, unbounded FROM total ORDER BY source"
            ).fetchall()
        return [self._saying(self._name(source), *numbers) for source, *numbers in found]

    def report(self) -> list[Row]:
        """Everything spent, a row per source, session, bundle and mode, in this order.

        Raises:
            ConfigError: the file is damaged or cannot be read.
            Unavailable: another process has held the file for too long.
        """
        with self._database.transaction() as connection:
            found = connection.execute(
                "SELECT source, session, bundle, mode, inputs, inferences, rounds, bits, "
                "unbounded, first_s, last_s FROM spent ORDER BY source, session, bundle, mode"
            ).fetchall()
        return [self._row(*row) for row in found]

    def _spent(self, connection: Any, source: str) -> Spent:
        found = connection.execute(
            "SELECT bits, unbounded FROM total WHERE source = ?", (source,)
        ).fetchone()
        return self._saying(source, *(found or (0.0, 0)))

    def _allow(self, before: Spent, bits: float, mode: str) -> None:
        """Refuse a charge on top of ``before`` that the budget does not hold."""
        budget = self.budget_bits
        if budget is None:
            return
        asked = f"asked for {bits:g}, the budget is {budget:g} bits"
        if bits == math.inf:
            raise BudgetSpent(
                f"source {before.source!r} has spent {before.bits:g} bits, {asked}: mode {mode!r} "
                "has no bound, so it cannot keep any budget"
            )
        if before.unbounded:
            raise BudgetSpent(
                f"source {before.source!r} has spent inf bits in {before.unbounded} inferences "
                f"without a bound, {asked}"
            )
        if add_up(before.bits, bits) > budget:
            raise BudgetSpent(f"source {before.source!r} has spent {before.bits:g} bits, {asked}")

    def _saying(self, source: str, bits: float, unbounded: int) -> Spent:
        budget, warning = self.budget_bits, None
        if budget is not None and unbounded:
            warning = (
                f"source {source!r} has {unbounded} inferences without a bound, so the budget of "
                f"{budget:g} bits is not kept"
            )
        elif budget is not None and bits >= self.warn_at * budget:
            share = _share(bits, budget)
            warning = (
                f"source {source!r} has spent {bits:g} of {budget:g} bits"
                f"{'' if share is None else f' ({share:.0%})'}"
            )
        return Spent(source, bits, unbounded, budget, warning)

    def _row(self, *columns: Any) -> Row:
        source, session, bundle, mode = map(self._name, columns[:4])
        inputs, inferences, rounds, bits, unbounded, first_s, last_s = columns[4:]
        return Row(
            source=source,
            session=session,
            bundle=bundle,
            mode=mode,
            inputs=inputs,
            inferences=inferences,
            rounds=rounds,
            bits=bits,
            unbounded=unbounded,
            first_s=first_s,
            last_s=last_s,
            share=_share(bits, self.budget_bits),
        )

    def _name(self, value: str) -> str:
        """A name as the file has it, which may have been written by anybody."""
        if not _is_name(value):  # it would also reach a terminal
            raise self._database.damaged("a name in it is none")
        return value


def add_up(spent: float, bits: float) -> float:
    """``spent + bits``, rounded up where float64 has to round.

    Sums are never below the true one, whatever the order, and a small charge is not lost on a
    large sum. The rounding error is found exactly (Knuth, The Art of Computer Programming, volume
    2, 4.2.2, theorem B).
    """
    total = spent + bits
    part = total - spent
    error = (spent - (total - part)) + (bits - part)
    return math.nextafter(total, math.inf) if error > 0 else total


def _share(bits: float, budget_bits: float | None) -> float | None:
    return bits / budget_bits if budget_bits else None  # no share of nothing


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARACTERS and value.isprintable()


def _check_name(name: str, value: object) -> None:
    if not _is_name(value):
        raise ConfigError(
            f"{name} is {value!r:.60}, expected 1 to {MAX_NAME_CHARACTERS} printable characters"
        )


def _count(name: str, value: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} is {value!r:.60}, expected a whole number") from None
    if not 1 <= count <= MAX_COUNT:
        raise ConfigError(f"{name} is {count}, expected 1 to {MAX_COUNT}")
    return count

"""What a batch costs: a + b * rows seconds, learned from the batches as they run.

    observe(rows, seconds) after each batch      predict(rows) before the next

Least squares over the last batches, the older the less: five lines of running means, so that one
batch costs a microsecond of accounting.
"""

from __future__ import annotations

_LATE_GAIN = 0.05  # of one batch on how late answers are
_DEVIATIONS = 3.0  # by which a promise is safer than the mean
_GAIN = 0.02  # weight of the newest batch: the model remembers about the last 50
_WARM = 8  # batches before anybody is refused on the model's word
_STIFFNESS = 1e-3  # squared relative spread of the rows below which the slope is kept as it is
_OUTLIER = 4.0  # a batch counts as this many times its prediction at most,
_OUTLIER_S = 0.001  # and this much more, in seconds, so that a prediction of 0 can grow


class CostModel:
    """Seconds of a batch as ``a_s + b_s * rows``, both at least 0.

    Batches that all have the same rows say nothing of the slope: the last one known stays (at first
    0), and the batches seen are predicted right. A single slow batch, such as one that the machine
    interrupted, moves it little; an engine that has become slower is learned all the same.

    Attributes:
        a_s: seconds per batch.
        b_s: seconds per row.
        batches: how many were observed.
    """

    __slots__ = ("_covariance", "_rows", "_seconds", "_variance", "a_s", "b_s", "batches")

    def __init__(self) -> None:
        """Know nothing: predict 0 s."""
        self.a_s = 0.0
        self.b_s = 0.0
        self.batches = 0
        self._rows = self._seconds = 0.0  # means
        self._variance = self._covariance = 0.0  # of the rows; of rows and seconds

    @property
    def warm(self) -> bool:
        """Whether it has seen enough to be believed."""
        return self.batches >= _WARM

    def predict(self, rows: float) -> float:
        """Seconds that one batch of ``rows`` should take."""
        return self.a_s + self.b_s * rows

    def rows_within(self, seconds: float, most: int) -> int:
        """The largest batch predicted to take at most ``seconds``: from 1 to ``most`` rows."""
        if self.predict(most) <= seconds:
            return most
        if self.b_s <= 0.0:
            return 1
        return max(1, min(most, int((seconds - self.a_s) / self.b_s)))

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from one batch that took ``seconds``."""
        if self.warm:
            seconds = min(seconds, _OUTLIER * self.predict(rows) + _OUTLIER_S)
        self.batches += 1
        gain = max(_GAIN, 1.0 / self.batches)  # at first all batches weigh the same
        more_rows, more_s = rows - self._rows, seconds - self._seconds
        self._rows += gain * more_rows
        self._seconds += gain * more_s
        self._variance = (1.0 - gain) * (self._variance + gain * more_rows * more_rows)
        self._covariance = (1.0 - gain) * (self._covariance + gain * more_rows * more_s)
        # Ridge regression towards the last slope: where rows hardly vary, noise would choose it.
        pull = _STIFFNESS * self._rows * self._rows
        b_s = max(0.0, (self._covariance + pull * self.b_s) / (self._variance + pull))
        # A line that meets the axis below 0 is replaced by the one through 0 and the means.
        self.b_s = min(b_s, self._seconds / self._rows)
        self.a_s = max(0.0, self._seconds - self.b_s * self._rows)


class Lateness:
    """How much later than predicted answers are out: mean and mean deviation.

    As TCP does it for its retransmission timer (RFC 6298): what scatters needs more of a margin. It
    covers all that the cost model cannot know: a machine that is busy, a thread that wakes late,
    answers that are written one after the other.
    """

    __slots__ = ("_deviation_s", "_mean_s")

    def __init__(self) -> None:
        """Expect answers on time."""
        self._mean_s = self._deviation_s = 0.0

    @property
    def allowance_s(self) -> float:
        """Seconds to keep clear before a deadline."""
        return self._mean_s + _DEVIATIONS * self._deviation_s

    def observe(self, seconds: float) -> None:
        """Learn that the answers of a batch were out so much after the predicted end."""
        late_s = max(0.0, seconds)
        self._deviation_s += _LATE_GAIN * (abs(late_s - self._mean_s) - self._deviation_s)
        self._mean_s += _LATE_GAIN * (late_s - self._mean_s)

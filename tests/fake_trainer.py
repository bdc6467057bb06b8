"""Trainers whose accuracy is a known function; light, because child processes import this."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from datamix.errors import ConfigError
from edge.search.trial import Measured, Trial


def accuracy(trial: Trial) -> float:
    """Grows with width and rounds, and with the seconds, for wide networks more slowly."""
    options = dict(trial.candidate.options)
    width, rounds = int(options["width"]), int(options.get("rounds", 1))
    ceiling = 0.6 + 0.3 * width / (width + 8) + 0.02 * rounds
    return ceiling * trial.seconds / (trial.seconds + width / 640)


def known(trial: Trial) -> Measured:
    return Measured(accuracy(trial), 1000)


def broken(trial: Trial) -> Measured:
    """Three ways to fail, by width; the fourth works."""
    match dict(trial.candidate.options)["width"]:
        case 1:
            raise ConfigError("the data are not there, expected some")
        case 2:
            raise ZeroDivisionError("division by zero")
        case 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return known(trial)


@dataclass(frozen=True)
class Sleeper:
    """Writes its process id to a file of the candidate's name, and sleeps."""

    folder: Path

    def __call__(self, trial: Trial) -> Measured:
        name = str(trial.candidate).replace(" ", "-")
        (self.folder / f"{name}.tmp").write_text(str(os.getpid()))
        (self.folder / f"{name}.tmp").replace(self.folder / f"{name}.pid")
        time.sleep(600)
        raise AssertionError("nobody ended this process")

"""``datamix train --search``: from settings to a folder with the outcome.

trials.jsonl   finished trials; the same command goes on from here
search.json    everything that was found
search.svg     the picture, or search.png
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from datamix.errors import ConfigError
from datamix.wire import DTYPES, Dtype
from edge.data import Dataset, load_dataset
from edge.search import report
from edge.search.budget import DeviceBudget
from edge.search.children import Tick, run_in_children
from edge.search.costs import cost
from edge.search.halving import Halving
from edge.search.journal import Journal
from edge.search.plot import plot
from edge.search.run import Costed, Race, Refused, Report, SearchResult, afford, draw
from edge.search.space import SearchSpace, make_space
from edge.search.training import HeldOutTrainer
from edge.search.trial import Outcome, Trial
from edge.settings import TrainConfig


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """One search.

    Attributes:
        output: folder of the outcome; may exist, if it is of a search on the same data.
        dataset: name of a data set; its training split is used and no other.
        directory: where its files are; None: ``$DATAMIX_DATA``.
        architecture: the network whose options are searched.
        vary: options and values, see :func:`edge.search.space.make_space`.
        options: of every candidate.
        budget: what the device can afford.
        halving: how many trainings of what length.
        candidates: at most so many of those within the budget race, drawn at random.
        training: how to train; its architecture, epochs, budget and seed are the search's.
        preset: name of the settings that ``training`` started from; None: the defaults.
        wire_dtype: what bytes are counted for.
        held_out: share of the training split that is measured with.
        seed: of everything random.
        jobs: trainings at a time, each in a process of its own.
        picture: kind of the plot.
        command: how this was asked for, to be written down.
    """

    output: Path
    dataset: str = "fashion-mnist"
    directory: Path | None = None
    architecture: str = "bridgenet"
    vary: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    budget: DeviceBudget = DeviceBudget()
    halving: Halving = Halving()
    candidates: int | None = 24
    training: TrainConfig = field(default_factory=lambda: TrainConfig(group_size=8))
    preset: str | None = None
    wire_dtype: Dtype = "float16"
    held_out: float = 0.1
    seed: int = 0
    jobs: int = 1
    picture: Literal["svg", "png"] = "svg"
    command: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse settings that cannot work, before hours have passed."""
        if self.wire_dtype not in DTYPES:
            raise ConfigError(
                f"wire_dtype is {self.wire_dtype!r}, expected one of {', '.join(DTYPES)}"
            )
        if self.candidates is not None and self.candidates < 1:
            raise ConfigError(f"candidates is {self.candidates}, expected at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected at least 0")
        if self.jobs < 1:
            raise ConfigError(f"jobs is {self.jobs}, expected at least 1")

    @property
    def trainer(self) -> HeldOutTrainer:
        """What runs the trials."""
        return HeldOutTrainer(
            load=partial(load_dataset, self.dataset, "train", self.directory),
            config=self.training,
            held_out=self.held_out,
        )


def plan(config: SearchConfig, say: Report = print) -> None:
    """Print what every candidate costs and how long the search would take; train nothing."""
    space, within, refused = _candidates(config, config.trainer.load())
    say(report.cost_table(within, space.label))
    for line in report.refused_lines(refused, space.label):
        say(line)
    racing = draw(within, config.candidates, config.seed)
    total_s = sum(rung.total_s for rung in config.halving.plan(len(racing)))
    say(
        f"{len(within)} within the budget, {len(refused)} refused; {len(racing)} would be trained,"
        f" for {total_s / 60:.0f} CPU minutes in all"
    )


def search(config: SearchConfig, say: Report = print) -> SearchResult:
    """Run the search, or go on with it, and write its outcome.

    Raises:
        ConfigError: settings or data that cannot be used, or no candidate within the budget.
        DataMixError: every training of a rung failed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("the plot needs matplotlib, expected it installed (the extra 'report')")
    trainer = config.trainer
    data = trainer.load()
    space, within, refused = _candidates(config, data)
    for line in report.refused_lines(refused, space.label):
        say(line)
    racing = draw(within, config.candidates, config.seed)
    config.output.mkdir(parents=True, exist_ok=True)

    def run(trials: Sequence[Trial], tick: Tick) -> Generator[Outcome, None, None]:
        return run_in_children(trainer, trials, config.jobs, tick)

    settings = trainer.settings(f"{data.name}, {len(data)} inputs")
    with Journal(config.output / "trials.jsonl", settings) as journal:
        race = Race(
            config.halving,
            config.seed,
            run,
            journal,
            label=space.label,
            report=say,
            jobs=config.jobs,
        )
        try:
            result = race.result(racing, refused, left_out=len(within) - len(racing))
        except KeyboardInterrupt:
            say("stopped; run the same command again to go on from here")
            raise
    _write(config, result, settings, space.label, say)
    return result


def _candidates(
    config: SearchConfig, data: Dataset
) -> tuple[SearchSpace, list[Costed], list[Refused]]:
    channels, height, width = data.preprocessing.input_shape
    shape, classes = (channels, height, width), len(data.class_names)
    recommended = config.training.architecture
    space = make_space(
        config.architecture,
        config.vary,
        config.options,
        input_shape=shape,
        classes=classes,
        # A preset's network, where nothing else is asked for; the printed command has it, too.
        defaults=recommended.options if recommended.name == config.architecture else {},
    )
    cost_of = partial(
        cost,
        method=config.training.method,
        group_size=config.training.group_size,
        wire_dtype=config.wire_dtype,
        input_shape=shape,
        classes=classes,
    )
    return space, *afford(space, config.budget, cost_of)


def _write(
    config: SearchConfig,
    result: SearchResult,
    settings: dict[str, Any],
    label: Callable[[Any], str],
    say: Report,
) -> None:
    command = report.train_command(
        result.chosen.candidate,
        dataset=config.dataset,
        directory=None if config.directory is None else str(config.directory),
        preset=config.preset,
        method=config.training.method,
        group_size=config.training.group_size,
        output=str(config.output / "bundle"),
    )
    about = {
        "command": shlex.join(config.command),
        "train_command": command,
        "training": settings,
        "seed": config.seed,
        "wire_dtype": config.wire_dtype,
        "budget": asdict(config.budget),
        "halving": asdict(config.halving),
    }
    report.write_json(report.to_json(result, about), config.output / "search.json")
    picture = config.output / f"search.{config.picture}"
    plot(
        result,
        picture,
        f"{config.architecture} on {settings['data']}, K = {config.training.group_size}",
    )
    say(report.table(result, label))
    say(f"Written: {config.output / 'search.json'}, {picture}")
    say(f"To train what was chosen on the whole training split:\n{command}")

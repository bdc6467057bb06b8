"""`datamix train|experiment|bundle|results`: parses and calls, nothing else.

The flags of the settings are made from :class:`edge.settings.TrainConfig`, names, types and help
alike, so that there is one list of them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from datamix.errors import ConfigError
from edge.augment import Augmentation
from edge.settings import TrainConfig

if TYPE_CHECKING:
    from datamix.models import Architecture

_FLAGS = {"version": "--model-version"}
# Given by flags of their own.
_COMPOUND = frozenset({"architecture", "augmentation"})
# Each arm of an experiment says these itself.
_OF_THE_ARMS = frozenset(
    {"name", "version", "method", "group_size", "law", "noise_sigma", "teacher", "seed"}
)

_Data = Annotated[Path | None, typer.Option(help="Folder of the data set; else $DATAMIX_DATA.")]
_OptionValues = Annotated[
    list[str] | None, typer.Option("--option", help="Of the architecture, KEY=VALUE; repeatable.")
]
_AugmentValues = Annotated[
    list[str] | None, typer.Option("--augment", help="KEY=VALUE; see docs/data.md; repeatable.")
]


def add_training(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(_with_settings(train))
    app.command()(_with_settings(experiment, without=_OF_THE_ARMS))
    app.command()(bundle)
    app.command()(results)


def train(
    output: Annotated[Path, typer.Option(help="New folder for the bundle.")],
    dataset: Annotated[
        str | None, typer.Option(help="Else the preset's, or fashion-mnist.")
    ] = None,
    data: _Data = None,
    preset: Annotated[
        str | None, typer.Option(help="Named settings to start from (edge/presets.py).")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Network, with its own defaults for --option.")
    ] = None,
    option: _OptionValues = None,
    rounds: Annotated[
        int | None, typer.Option(help="Trips to the cloud per inference; an --option, too.")
    ] = None,
    augment: _AugmentValues = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard's files.")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that train together, placed by Ray Train.")
    ] = 1,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster for them, auto or host:port; else our own.")
    ] = None,
    **settings: Any,
) -> None:
    """Train a model and save it as a bundle; the same command goes on after Ctrl-C."""
    from edge.data import load_dataset
    from edge.fit import stop_on_interrupt
    from edge.presets import preset as find
    from edge.train import train as run

    base = TrainConfig() if preset is None else find(preset).config
    found = _changed(base, architecture, option, rounds, augment, settings)
    dataset = dataset or ("fashion-mnist" if preset is None else find(preset).dataset)
    if workers != 1:
        from cluster.ray_training import Task, train_together

        task = Task(found, dataset, _absolute(data), str(output.absolute()), _absolute(tensorboard))
        train_together(task, workers, address)
        return
    inputs = load_dataset(dataset, "train", data), load_dataset(dataset, "test", data)
    with stop_on_interrupt() as stop, _scalars(tensorboard) as scalars:
        manifest = run(
            found,
            *inputs,
            output,
            report=partial(print, flush=True),
            stop=stop,
            scalars=scalars,
        )
    if manifest is not None:
        print(manifest.model_dump_json(indent=2))


def experiment(
    preset: Annotated[str, typer.Argument(help="Which one (edge/presets.py).")],
    data: _Data = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.")] = "0,1,2",
    arms: Annotated[
        str | None, typer.Option(help="Only these arms and their teachers, with commas.")
    ] = None,
    results: Annotated[Path, typer.Option(help="File to which the rows are added.")] = Path(
        "docs/results.json"
    ),
    runs: Annotated[Path, typer.Option(help="Folder for checkpoints and weights.")] = Path("runs"),
    **settings: Any,
) -> None:
    """Compare methods at one budget; trainings whose rows exist are left out."""
    from edge.data import load_dataset
    from edge.experiment import experiment as run
    from edge.fit import stop_on_interrupt
    from edge.presets import preset as find

    chosen = find(preset)
    inputs = load_dataset(chosen.dataset, "train", data), load_dataset(chosen.dataset, "test", data)
    changes = {key: value for key, value in settings.items() if value is not None}
    with stop_on_interrupt() as stop:
        run(
            chosen,
            *inputs,
            seeds=_integers(seeds),
            labels=tuple(arms.split(",")) if arms else (),
            results=results,
            runs=runs,
            report=partial(print, flush=True),
            stop=stop,
            **changes,
        )


def bundle(
    preset: Annotated[str, typer.Argument(help="The experiment (edge/presets.py).")],
    output: Annotated[Path, typer.Option(help="New folder for the bundle.")],
    name: Annotated[str, typer.Option(help="Of the model.")],
    data: _Data = None,
    model_version: Annotated[str, typer.Option(help="Of the model.")] = "1",
    arm: Annotated[str, typer.Option(help="Whose network; its blocks are linear.")] = "linear",
    seed: Annotated[int, typer.Option(help="Of its training.")] = 0,
    noise_sigma: Annotated[
        float | None, typer.Option(help="Of its training, where the arm has several.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Inputs mixed together.")] = 4,
    results: Annotated[Path, typer.Option(help="Rows of the experiment.")] = Path(
        "docs/results.json"
    ),
    runs: Annotated[Path, typer.Option(help="Where it kept its weights.")] = Path("runs"),
) -> None:
    """Make a bundle and its model card of a network that an experiment trained."""
    from edge.data import load_dataset
    from edge.presets import preset as find
    from edge.shipping import ship

    chosen = find(preset)
    manifest = ship(
        chosen,
        load_dataset(chosen.dataset, "train", data),
        load_dataset(chosen.dataset, "test", data),
        output,
        label=arm,
        seed=seed,
        noise_sigma=noise_sigma,
        group_size=group_size,
        runs=runs,
        results=results,
        name=name,
        version=model_version,
    )
    print(manifest.model_dump_json(indent=2))


def results(
    json_path: Annotated[Path, typer.Option("--json", help="The rows.")] = Path(
        "docs/results.json"
    ),
    markdown: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/results.md"),
    plots: Annotated[
        Path | None, typer.Option(help="Folder for plots; else beside the page, of its name.")
    ] = None,
    attacks: Annotated[
        Path, typer.Option(help="What benchmarks.attacks wrote, for the mode bounded.")
    ] = Path("docs/benchmarks/attacks.json"),
) -> None:
    """Make the page of results from the rows: tables, plots, the paper's claims."""
    from edge.results_page import write_page

    write_page(json_path, markdown, plots or markdown.with_suffix(""), attacks)


def _absolute(path: Path | None) -> str | None:
    """For workers, which run in folders of their own."""
    return None if path is None else str(path.absolute())


def _scalars(folder: Path | None) -> AbstractContextManager[Any]:
    """A writer of TensorBoard's files, closed at the end; nothing without a folder."""
    if folder is None:
        return nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    writer: AbstractContextManager[Any] = SummaryWriter(str(folder))
    return writer


def _with_settings(
    command: Callable[..., None], without: frozenset[str] = frozenset()
) -> Callable[..., None]:
    """The command with a flag for each setting, but for those ``without``."""
    signature = inspect.signature(command, eval_str=True)
    given = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    known = {p.name for p in given} | _COMPOUND | without
    types, texts = get_type_hints(TrainConfig, localns={"Architecture": Any}), _texts()
    flags = []
    for field in fields(TrainConfig):
        if field.name in known:
            continue
        name = field.name.replace("_", "-")
        default = "" if field.default in (MISSING, None) else f" (default {field.default})"
        words = (_FLAGS[field.name],) if field.name in _FLAGS else (f"--{name}",)
        if types[field.name] is bool:
            words = (f"--{name}/--no-{name}",)
        about = typer.Option(*words, help=texts[field.name] + default, show_default=False)
        kind: Any = types[field.name] | None
        annotation = Annotated[kind, about]
        flags.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )
        )

    def run(**values: Any) -> None:
        command(**values)

    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in given] + flags
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _texts() -> dict[str, str]:
    """What the docstring of the settings says about each, on one line, in plain text."""
    _, _, listed = inspect.cleandoc(TrainConfig.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", listed, re.MULTILINE)
    plain = {name: re.sub(r":\w+:`([^`]*)`|``", r"\1", text) for name, text in entries}
    return {name: re.sub(r"\s+", " ", text) for name, text in plain.items()}


def _changed(
    base: TrainConfig,
    architecture: str | None,
    option: list[str] | None,
    rounds: int | None,
    augment: list[str] | None,
    settings: Mapping[str, Any],
) -> TrainConfig:
    """The settings, with what the command line says over them."""
    return replace(
        base,
        architecture=_architecture(base.architecture, architecture, option, rounds),
        augmentation=_augmentation(base.augmentation, augment),
        **{key: value for key, value in settings.items() if value is not None},
    )


def _architecture(
    base: Architecture, name: str | None, option: list[str] | None, rounds: int | None
) -> Architecture:
    from datamix.models import Architecture

    name = name or base.name
    options = dict(base.options) if name == base.name else {}
    for key, value in map(_pair, option or ()):
        options[key] = int(value) if re.fullmatch(r"-?\d+", value) else value
    if rounds is not None:
        options["n_blocks" if name == "convnet" else "rounds"] = rounds
    return Architecture(name, options)


def _augmentation(base: Augmentation, augment: list[str] | None) -> Augmentation:
    types = get_type_hints(Augmentation)
    changes: dict[str, Any] = {}
    for key, value in map(_pair, augment or ()):
        if key not in types:
            raise ConfigError(f"augment has {key!r}, expected one of {', '.join(types)}")
        try:
            if types[key] is bool:
                changes[key] = {"true": True, "false": False}[value]
            else:
                changes[key] = types[key](value) if types[key] in (int, float) else value
        except (KeyError, ValueError):
            raise ConfigError(f"augment {key} is {value!r}, expected {types[key]}") from None
    return replace(base, **changes)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"got {text!r}, expected KEY=VALUE")
    return key, value


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"seeds are {text!r}, expected numbers with commas between") from None

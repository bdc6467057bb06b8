"""``datamix train --search``, or ``datamix search``: parses and calls, nothing else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def as_search(arguments: Sequence[str]) -> list[str]:
    """``train --search ...`` as ``search ...``; any other command as it is.

    A search takes a network's options as lists and has a budget: its flags are not those of a
    training, so it is a command of its own.
    """
    if arguments[:1] and arguments[0] == "train" and "--search" in arguments:
        return ["search", *(word for word in arguments[1:] if word != "--search")]
    return list(arguments)


def search(
    output: Annotated[
        Path, typer.Option(help="Folder for the outcome; the same command goes on from there.")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(help="Only its training split is read; else the preset's, or fashion-mnist."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Named settings to train with (edge/presets.py).")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="How to train, such as linear or datamix; else the preset's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data set; else $DATAMIX_DATA.")
    ] = None,
    architecture: Annotated[str, typer.Option(help="The network to search in.")] = "bridgenet",
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="An option and its values: stem_width=16,32 or widths='64,96|96,128'; again for "
            "more. By default the network's own space."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of every candidate, NAME=VALUE; again for more."),
    ] = None,
    max_edge_share: Annotated[
        float | None,
        typer.Option(help="Share of all FLOPs on the device, linear blocks collapsed."),
    ] = None,
    max_edge_flops: Annotated[int | None, typer.Option(help="FLOPs on the device.")] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Bytes on the wire per input, both ways, all rounds.")
    ] = None,
    max_round_trips: Annotated[int | None, typer.Option(help="Trips to the cloud.")] = None,
    max_device_bytes: Annotated[
        int | None, typer.Option(help="Bytes of the device's weights, float32.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs mixed together; else the preset's, or 8.")
    ] = None,
    wire_dtype: Annotated[
        Literal["float16", "float32", "int8", "int16"],
        typer.Option(help="What bytes are counted for."),
    ] = "float16",
    seconds: Annotated[
        float, typer.Option(help="CPU seconds of each training in the first rung.")
    ] = 20.0,
    rungs: Annotated[int, typer.Option(help="Each trains the better part again, longer.")] = 3,
    factor: Annotated[
        int, typer.Option(help="So many times longer from rung to rung, for as many times fewer.")
    ] = 2,
    candidates: Annotated[
        int, typer.Option(help="At most so many race, drawn at random; 0: all within the budget.")
    ] = 24,
    held_out: Annotated[
        float, typer.Option(help="Share of the training split to measure with.")
    ] = 0.1,
    batch_size: Annotated[
        int | None, typer.Option(help="Inputs per step; else the preset's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    jobs: Annotated[int, typer.Option(help="Trainings at a time, a process each.")] = 1,
    threads: Annotated[int, typer.Option(help="Processor threads of each training.")] = 1,
    picture: Annotated[Literal["svg", "png"], typer.Option(help="Kind of the plot.")] = "svg",
    costs_only: Annotated[
        bool, typer.Option("--costs-only", help="Print what each candidate costs; train nothing.")
    ] = False,
) -> None:
    """Find the best architecture that a device can afford, and the Pareto front around it."""
    from edge.presets import preset as find
    from edge.search.budget import DeviceBudget
    from edge.search.command import SearchConfig, plan
    from edge.search.command import search as run
    from edge.search.halving import Halving
    from edge.settings import TrainConfig

    base = TrainConfig(group_size=8) if preset is None else find(preset).config
    changes: dict[str, Any] = {"method": method, "group_size": group_size, "batch_size": batch_size}
    given = {key: value for key, value in changes.items() if value is not None}
    training = replace(base, threads=threads, **given)
    config = SearchConfig(
        output=output,
        dataset=dataset or ("fashion-mnist" if preset is None else find(preset).dataset),
        directory=data,
        architecture=architecture,
        vary=tuple(vary or ()),
        options=tuple(option or ()),
        budget=DeviceBudget(
            edge_flops_share=max_edge_share,
            edge_flops=max_edge_flops,
            bytes_per_inference=max_bytes,
            round_trips=max_round_trips,
            parameters_device_bytes=max_device_bytes,
        ),
        halving=Halving(seconds, rungs, factor),
        candidates=candidates or None,
        training=training,
        preset=preset,
        wire_dtype=wire_dtype,
        held_out=held_out,
        seed=seed,
        jobs=jobs,
        picture=picture,
        command=("datamix", *sys.argv[1:]),
    )
    (plan if costs_only else run)(config, partial(print, flush=True))

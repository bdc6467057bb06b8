"""``datamix simulate``: a fleet of devices, let loose on a cloud."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.options import (
    AllowSameOperator,
    Bundle,
    CaFile,
    Inputs,
    ModeName,
    Profiles,
    Rows,
    SecondTokenFile,
    SecondUrl,
    TokenFile,
    Verify,
    Workload,
    read_token,
)

if TYPE_CHECKING:
    from edge.fleet.crew import Launch
    from edge.fleet.run import OnProgress


def simulate(
    url: Annotated[
        list[str],
        typer.Option(help="Base URL of the cloud, http://host:port; several for more front doors."),
    ],
    bundle: Bundle = None,
    inputs: Inputs = None,
    devices: Annotated[int, typer.Option(help="Devices, each with a stream of its own.")] = 200,
    rate: Annotated[float, typer.Option(help="Inferences (groups) per second, all devices.")] = 50,
    duration: Annotated[float, typer.Option(help="Seconds in which inferences fall due.")] = 20,
    seed: Annotated[int, typer.Option(help="Same seed, same schedule.")] = 0,
    processes: Annotated[
        int | None,
        typer.Option(help="Processes that hold the devices; else 1, on Ray as many as have room."),
    ] = None,
    on_ray: Annotated[
        bool, typer.Option("--on-ray", help="Processes are actors of a Ray cluster.")
    ] = False,
    ray_address: Annotated[
        str, typer.Option(help="The Ray cluster, auto or host:port, with --on-ray.")
    ] = "auto",
    ray_resources: Annotated[
        str, typer.Option(help="What an actor takes of its node, such as CPU=1,generator=1.")
    ] = "CPU=1",
    pacer: Annotated[
        str,
        typer.Option(
            "--arrivals",
            "--pacer",
            help="poisson, constant, gamma:shape=0.25, ramp:to=400, steps:10=200,15=50, "
            "diurnal:depth=0.8, trace:FILE, or closed:think_s=1 (a closed loop).",
        ),
    ] = "poisson",
    profiles: Profiles = None,
    churn: Annotated[
        str | None, typer.Option(help="Devices come and go: on_s=60,off_s=20.")
    ] = None,
    storm: Annotated[
        list[str] | None,
        typer.Option(help="Streams lost and opened at once: at_s=10,share=0.5; several allowed."),
    ] = None,
    slow_readers: Annotated[
        str | None, typer.Option(help="Devices that let answers wait: share=0.1,pause_s=0.5.")
    ] = None,
    cancel: Annotated[
        str | None, typer.Option(help="Inferences given up by the device: share=0.05,after_s=0.2.")
    ] = None,
    workload: Workload = "bundle",
    verify: Verify = True,
    timeout: Annotated[float, typer.Option(help="Seconds until an inference has failed.")] = 10,
    rows: Rows = 4,
    warm_up: Annotated[
        float, typer.Option(help="Inferences due in the first so many seconds are in no latency.")
    ] = 0,
    slo: Annotated[
        float | None, typer.Option(help="Seconds up to which a right answer is of use (goodput).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the run's record, written as it goes.")
    ] = None,
    precompute: Annotated[
        int,
        typer.Option(help="Mix so many groups once and repeat them, as no device would; 0: never."),
    ] = 0,
    mode: ModeName = None,
    second: SecondUrl = None,
    second_token_file: SecondTokenFile = None,
    allow_same_operator: AllowSameOperator = False,
    masks_ahead: Annotated[
        int, typer.Option(help="For split: groups that a process keeps masks ready for.")
    ] = 64,
    threshold: Annotated[
        list[str] | None,
        typer.Option(help="A gate such as p99<100ms or error-rate<1%; several may be given."),
    ] = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Serve figures to Prometheus while it runs, at HOST:PORT."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write the report to this file.")
    ] = None,
) -> None:
    """Let a fleet of devices loose on a cloud; exit code 1 if it failed any, 3 if not valid.

    4 if a threshold was not kept, or there were too few samples to judge it.
    """
    from edge.fleet import behaviour
    from edge.fleet import profiles as kinds
    from edge.fleet.command import run
    from edge.fleet.config import FleetConfig
    from edge.fleet.processes import processes as own_processes
    from edge.fleet.threshold import parse_threshold

    gates = [parse_threshold(text) for text in threshold or ()]

    with contextlib.ExitStack() as stack:
        launch: Launch = own_processes
        if on_ray:
            from cluster.ray_fleet import on_ray as connect
            from cluster.ray_fleet import parse_resources

            fleet = stack.enter_context(connect(ray_address, parse_resources(ray_resources)))
            launch = fleet
            processes = fleet.room() if processes is None else processes
        config = FleetConfig(
            url=url[0],
            doors=tuple(url[1:]),
            bundle=bundle,
            inputs=inputs,
            devices=devices,
            rate=rate,
            duration_s=duration,
            seed=seed,
            processes=1 if processes is None else processes,
            pacer=pacer,
            workload=workload,
            verify=verify,
            timeout_s=timeout,
            rows=rows,
            warm_up_s=warm_up,
            slo_s=slo,
            out=None if out is None else str(out.absolute()),
            precompute=precompute,
            token=read_token(token_file),
            ca_file=None if ca_file is None else str(ca_file),
            mode=mode,
            second=second,
            second_token=None if second_token_file is None else read_token(second_token_file),
            allow_same_operator=allow_same_operator,
            masks_ahead=masks_ahead,
            profiles=() if profiles is None else kinds.read(profiles),
            churn=None if churn is None else behaviour.churn(churn),
            storms=tuple(behaviour.storm(text) for text in storm or ()),
            slow_readers=None if slow_readers is None else behaviour.slow_readers(slow_readers),
            cancel=None if cancel is None else behaviour.cancellations(cancel),
        )
        also: list[OnProgress] = []
        if metrics is not None:
            from cluster.fleet_metrics import serving_metrics

            also.append(stack.enter_context(serving_metrics(metrics)))
        raise typer.Exit(run(config, json_path, html_path, gates, launch, also))

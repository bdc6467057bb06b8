"""``datamix capacity`` and ``datamix scenario``: how many devices a cloud carries, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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

Url = Annotated[str, typer.Option(help="Base URL of the cloud, http://host:port.")]
Seed = Annotated[int, typer.Option(help="Same seed, same schedules.")]
Slo = Annotated[str, typer.Option(help="The objective: p99=100ms, p90=0.5s, p99.9=250ms.")]
Processes = Annotated[int, typer.Option(help="Processes that hold the devices.")]
Timeout = Annotated[
    float | None,
    typer.Option(help="Seconds until an inference has failed; else 4 times the objective, or 1."),
]
Tolerance = Annotated[
    float, typer.Option(help="The search ends at an interval of plus and minus that share.")
]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]


def capacity(
    url: Url,
    slo: Slo,
    bundle: Bundle = None,
    inputs: Inputs = None,
    rate_per_device: Annotated[
        float, typer.Option(help="Inferences per second of one device.")
    ] = 0.1,
    most_devices: Annotated[
        int, typer.Option(help="Do not look for more devices than these.")
    ] = 10_000_000,
    start_rate: Annotated[
        float, typer.Option(help="Inferences per second to begin with; it doubles from there.")
    ] = 32,
    tolerance: Tolerance = 0.03,
    probes: Annotated[int, typer.Option(help="Try at most so many rates.")] = 24,
    probe_seconds: Annotated[
        float | None, typer.Option(help="Observe a rate at most so long; else what suits --slo.")
    ] = None,
    max_streams: Annotated[
        int, typer.Option(help="Connect at most so many devices; each then stands for several.")
    ] = 10_000,
    processes: Processes = 1,
    seed: Seed = 0,
    arrivals: Annotated[
        str, typer.Option(help="poisson, constant or gamma:shape=0.25, over all devices.")
    ] = "poisson",
    profiles: Profiles = None,
    workload: Workload = "bundle",
    verify: Verify = True,
    rows: Rows = 4,
    timeout: Timeout = None,
    mode: ModeName = None,
    second: SecondUrl = None,
    second_token_file: SecondTokenFile = None,
    allow_same_operator: AllowSameOperator = False,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    json_path: JsonPath = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the probes in the file of --json.")
    ] = False,
) -> None:
    """Find how many devices a cloud carries within an objective, and what limits it."""
    from edge.fleet import profiles as kinds
    from edge.fleet.capacity import Fleet
    from edge.fleet.capacity_command import default_timeout_s, run_capacity
    from edge.fleet.config import FleetConfig
    from edge.fleet.objective import parse_objective
    from edge.fleet.search import Plan

    objective = parse_objective(slo)
    base = FleetConfig(
        url=url,
        bundle=bundle,
        inputs=inputs,
        processes=processes,
        seed=seed,
        pacer=arrivals,
        profiles=() if profiles is None else kinds.read(profiles),
        workload=workload,
        verify=verify,
        rows=rows,
        token=read_token(token_file),
        ca_file=None if ca_file is None else str(ca_file),
        mode=mode,
        second=second,
        second_token=None if second_token_file is None else read_token(second_token_file),
        allow_same_operator=allow_same_operator,
    )
    fleet = Fleet(
        base,
        rate_per_device,
        max_streams,
        default_timeout_s(objective.latency_s) if timeout is None else timeout,
    )
    most_rate = most_devices * rate_per_device
    plan = Plan(
        objective,
        start_rate=min(start_rate, most_rate),
        least_rate=min(0.25, start_rate, most_rate),
        most_rate=most_rate,
        tolerance=tolerance,
        most_probes=probes,
        most_s=probe_seconds,
    )
    raise typer.Exit(run_capacity(fleet, plan, seed=seed, json_path=json_path, resume=resume))


def scenario(
    name: Annotated[
        Literal["single-stream", "multi-stream", "server", "offline"],
        typer.Argument(help="As MLPerf's LoadGen defines it; all but server are closed loops."),
    ],
    url: Url,
    bundle: Bundle = None,
    inputs: Inputs = None,
    duration: Annotated[
        float, typer.Option(help="Seconds at least, after the warm-up; not of server.")
    ] = 20,
    per_query: Annotated[int, typer.Option(help="Inferences per query of multi-stream.")] = 8,
    depth: Annotated[int, typer.Option(help="Inferences under way at once in offline.")] = 256,
    slo: Annotated[str, typer.Option(help="The objective of server.")] = "p99=100ms",
    tolerance: Tolerance = 0.03,
    processes: Processes = 1,
    seed: Seed = 0,
    workload: Workload = "bundle",
    verify: Verify = True,
    rows: Rows = 4,
    timeout: Timeout = None,
    mode: ModeName = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    json_path: JsonPath = None,
) -> None:
    """Measure a cloud in one of MLPerf's scenarios."""
    from edge.fleet import scenario as scenarios
    from edge.fleet.capacity_command import run_closed
    from edge.fleet.config import FleetConfig

    if name == "server":
        # One device per inference and second: its devices are rates.
        capacity(
            url,
            slo,
            bundle=bundle,
            inputs=inputs,
            rate_per_device=1.0,
            tolerance=tolerance,
            processes=processes,
            seed=seed,
            workload=workload,
            verify=verify,
            rows=rows,
            timeout=timeout,
            mode=mode,
            token_file=token_file,
            ca_file=ca_file,
            json_path=json_path,
        )
        return
    config = FleetConfig(
        url=url,
        bundle=bundle,
        inputs=inputs,
        seed=seed,
        workload=workload,
        verify=verify,
        rows=rows,
        timeout_s=10.0 if timeout is None else timeout,
        mode=mode,
        token=read_token(token_file),
        ca_file=None if ca_file is None else str(ca_file),
    )
    if name == "single-stream":
        chosen = scenarios.single_stream()
    elif name == "multi-stream":
        chosen = scenarios.multi_stream(per_query)
    else:
        chosen = scenarios.offline(depth)
    raise typer.Exit(run_closed(chosen, config, duration, json_path))

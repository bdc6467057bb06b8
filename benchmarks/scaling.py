"""From one machine to ten million devices: a plan on paper, from what was measured.

scaling_cases.py reads the figures, scaling_plan.py works out what they come to, and this makes the
tables of docs/scaling.md.

python -m benchmarks.scaling            prints the tables
python -m benchmarks.scaling --write    puts them into docs/scaling.md
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.scaling_cases import (
    ROOT,
    build_case,
    core_rows_per_s,
    max_workers,
    message_cpu,
    read_settings,
    result,
    shares,
)
from benchmarks.scaling_plan import Case, devices_per_node, opening_rate, plan, takes
from deployments.profile import read_profile

PAGE = ROOT / "docs/scaling.md"
SCALES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
HABITS_DEVICES, HABITS = 1_000_000, (2.0, 20.0, 200.0, 2_000.0, 20_000.0)


def figure(value: float) -> str:
    """Three significant digits, and thousands parted; nothing for less than a millionth."""
    if not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-6:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    return f"{rounded:,.{max(0, digits)}f}"


def markdown(rows: Sequence[Mapping[str, str]], header: Iterable[str] | None = None) -> str:
    """Rows as a table, under their keys or another header."""
    lines = ["| " + " | ".join(header or rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows])


def plan_table(case: Case, scales: Sequence[int]) -> str:
    """What each number of devices needs, a column for each."""
    columns = []
    for found in (plan(case, devices) for devices in scales):
        millions = found.inferences_per_day / 1e6
        columns.append(
            {
                "devices": f"{found.devices:,}",
                "streams at once": figure(found.streams),
                "inferences/s": figure(found.inferences_per_s),
                "rows/s of the engines": figure(found.rows_per_s),
                "busy cores of all front doors": figure(found.door_cores),
                "workers, one spare per cluster": f"{found.nodes:,}",
                "GPUs": f"{found.gpus:,}",
                "streams per front door": figure(found.streams / (found.nodes - found.clusters)),
                "decides the number of workers": f"{found.limit} ({found.full:.0%} in use)",
                "Ray clusters": f"{found.clusters:,}",
                "regions": f"{found.regions:,}",
                "reports/s to a controller": figure(found.reports_per_s),
                "streams of a lost worker are back after, s": figure(found.storm_s),
                "USD a day": figure(found.usd_per_day),
                "USD a day, if nothing scaled down": figure(found.peak_usd_per_day),
                "USD per million inferences": figure(found.usd_per_day / millions),
                "egress on top, USD per million": figure(found.egress_usd_per_day / millions),
            }
        )
    first, *others = list(columns[0])
    header = {first: first} | {column[first]: column[first] for column in columns}
    return markdown(
        [{first: name} | {column[first]: column[name] for column in columns} for name in others],
        header,
    )


def node_table(cases: Sequence[Case]) -> str:
    """How many devices one node holds in the busiest hour, by each of its limits."""
    rows = []
    for case in cases:
        held = devices_per_node(case, case.behaviour.peak)
        least = min(held.values())
        rows.append(
            {"case": case.title}
            | {
                limit: f"**{figure(devices)}**" if devices == least else figure(devices)
                for limit, devices in held.items()
            }
        )
    return markdown(rows)


def breaks_table(cases: Sequence[Case], health_check_s: float) -> str:
    """At how many devices which limit is met, the first one first, for each case."""
    rows = []
    for case in cases:
        held = min(devices_per_node(case, case.behaviour.peak).values())
        most = case.fleetwide.nodes_per_cluster - 1
        share = takes(case, case.behaviour.peak)["connections"]
        met = {
            "ports of a single machine's front door": case.fleetwide.ports / share,
            "one worker is full": held,
            f"max_workers of cluster.yaml ({max_workers()})": held * (max_workers() - 1),
            f"nodes of one Ray cluster ({most + 1})": held * most,
            "devices of one region": float(case.fleetwide.devices_per_region),
        }
        row = {"case": case.title}
        row |= {limit: figure(devices) for limit, devices in met.items()}
        row["health checks/s of a replica in a full cluster"] = figure((most + 1) / health_check_s)
        rows.append(row)
    return markdown(rows)


def habits_table(settings: dict[str, Any], devices: int, habits: Sequence[float]) -> str:
    """So many devices that ask more or less often: what decides then, and what it costs."""
    rows = []
    for entry in settings["cases"]:
        for per_day in habits:
            case = build_case(settings, entry, per_day=per_day)
            found = plan(case, devices)
            rows.append(
                {
                    "case": case.title,
                    "inferences per device and day": f"{per_day:,.0f}",
                    "streams at once": figure(found.streams),
                    "streams opened per s": figure(
                        devices
                        * opening_rate(
                            case.behaviour.rate(case.behaviour.peak), case.behaviour.idle_timeout_s
                        )
                    ),
                    "workers": f"{found.nodes:,}",
                    "decides": found.limit,
                    "USD per million inferences": figure(
                        found.usd_per_day / found.inferences_per_day * 1e6
                    ),
                }
            )
    return markdown(rows)


@dataclass(frozen=True, slots=True)
class Replay:
    """Core seconds of a run that was measured, and what the same figures predict for it."""

    predicted_s: dict[str, float]
    measured_s: float


def replay() -> Replay:
    """The run of benchmarks.fleet_scale, from what single messages and streams cost."""
    run = result("fleet_scale")
    (row,) = run["rows"]
    (seconds,) = re.findall(r"until the end, (\d+) s", " ".join(run["notes"]))
    (requests,) = re.findall(r"inferences (\d+)", run["notes"][1])
    parts = {part["part"]: part for part in result("streams")["rows"]}
    streams = int(re.findall(r"^(\d+) streams", result("streams")["title"])[0])
    both = [parts["replica"], parts["HAProxy"]]
    opening = sum(part["CPU us to open"] for part in both)
    idling = sum(part["CPU us per idle second"] for part in both)
    # Ray works by the clock: what it did beside so many streams, once for each cloud.
    rest = parts["rest of Ray"]["CPU us per idle second"] * streams
    return Replay(
        {
            "messages": int(requests) * message_cpu(33),
            "opening of streams": 1e-6 * row["devices"] * opening,
            "open streams": 1e-6 * row["devices"] * idling * int(seconds),
            "Ray itself": 1e-6 * rest * row["front doors"] * int(seconds),
        },
        1e-6 * row["server CPU us"] * int(requests),
    )


def replay_table() -> str:
    """Prediction and measurement side by side."""
    found = replay()
    rows = [
        {"core seconds": name, "value": figure(value)} for name, value in found.predicted_s.items()
    ]
    predicted = sum(found.predicted_s.values())
    rows.append({"core seconds": "predicted in all", "value": figure(predicted)})
    rows.append({"core seconds": "measured", "value": figure(found.measured_s)})
    return markdown(rows)


def input_table(settings: dict[str, Any], cases: Sequence[Case]) -> str:
    """Every figure that goes in, and what kind it is."""
    door, loop = shares()
    rows = [
        ("core us per message of 33 kB, 4,096 streams", 1e6 * message_cpu(33), "field.json"),
        ("of which HAProxy's", door, "transports.json"),
        ("of which the replica's", loop, "transports.json"),
        ("core us to open a stream, HAProxy", 1e6 * cases[0].stream.door_open_s, "streams.json"),
        ("core us to open a stream, replica", 1e6 * cases[0].stream.loop_open_s, "streams.json"),
        ("kB per open stream, both", result("streams")["figures"]["kb_per_stream"], "streams.json"),
        (
            "core us a second for an open stream, both",
            result("streams")["figures"]["cpu_us_per_idle_second"],
            "streams.json",
        ),
    ]
    rows += [
        (
            f"rows/s of a core, block 0 of {name}",
            core_rows_per_s(entry["measured_as"]),
            "saturation.json",
        )
        for name, entry in settings["workloads"].items()
    ]
    told = [
        {"figure": name, "value": figure(value), "kind": "measured", "source": source}
        for name, value, source in rows
    ]
    works = {case.workload.name: case.workload for case in cases}
    for work in works.values():
        told += [
            {
                "figure": f"{work.name}: {what}",
                "value": figure(value),
                "kind": "computed",
                "source": "`datamix costs`",
            }
            for what, value in (
                ("messages per inference", work.rounds),
                ("kB up per message", work.up_bytes / 1e3),
                ("kB down per message", work.down_bytes / 1e3),
                ("MFLOP per row and round", work.flops_per_row / 1e6),
            )
        ]
    told += [
        {
            "figure": f"{case.title}: rows/s of a worker's engine",
            "value": figure(case.node.rows_per_s),
            "kind": "from an assumption" if "g6." in case.title else "from what was measured",
            "source": "`deployments/capacity.py`",
        }
        for case in cases
    ]
    prices = settings["prices"]
    told += [
        {
            "figure": f"USD an hour, {name}",
            "value": f"{price:g}",
            "kind": "documented",
            "source": f"{prices['source']}, {prices['date']}",
        }
        for name, price in prices["hour"].items()
    ]
    told += [
        {
            "figure": name.replace("_", " "),
            "value": figure(entry["value"]),
            "kind": "documented",
            "source": entry["source"],
        }
        for name, entry in settings["documented"].items()
    ]
    told += [
        {
            "figure": name.replace("_", " "),
            "value": figure(entry["value"]),
            "kind": "assumed",
            "source": entry["why"],
        }
        for name, entry in settings["assumed"].items()
    ]
    return markdown(told)


def tables(
    settings: dict[str, Any], cases: Sequence[Case], scales: Sequence[int] = SCALES
) -> dict[str, str]:
    """All tables by name, as docs/scaling.md has them."""
    checks_s = settings["documented"]["health_check_every_s"]["value"]
    made = {
        "a replay": replay_table(),
        "a node": node_table(cases),
        "what breaks": breaks_table(cases, checks_s),
        "habits": habits_table(settings, HABITS_DEVICES, HABITS),
    }
    made |= {case.title: plan_table(case, scales) for case in cases}
    return made | {"what goes in": input_table(settings, cases)}


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with each table between its marks replaced.

    Raises:
        ValueError: the page has no place for one, or a place for none of them.
    """
    places = set(re.findall(r"<!-- table: (.*) -->", page))
    if places != set(made):
        raise ValueError(f"the page has places for {sorted(places)}, expected {sorted(made)}")
    for name, table in made.items():
        mark = f"<!-- table: {name} -->"
        before, _, rest = page.partition(f"{mark}\n")
        page = f"{before}{mark}\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


def main() -> None:
    """Print the tables, or write them."""
    parser = report.parser(__doc__)
    parser.add_argument("--write", action="store_true", help="put them into docs/scaling.md")
    parser.add_argument(
        "--devices", type=int, action="append", help="instead of 1e3 to 1e7; repeat"
    )
    parser.add_argument("--per-day", type=float, help="inferences per device and day")
    parser.add_argument("--peak", type=float, help="the busiest hour over the mean, 1 to 2")
    parser.add_argument("--profile", type=Path, help="of datamix profile-engine, for all cases")
    options = parser.parse_args()
    changed = (options.devices, options.per_day, options.peak, options.profile)
    if options.write and any(value is not None for value in changed):
        parser.error("--write takes scaling.yaml as it is: change that instead")
    if options.peak is not None and not 1 <= options.peak <= 2:
        parser.error(f"peak is {options.peak:g}, expected 1 to 2")
    settings = read_settings()
    profile = None if options.profile is None else read_profile(options.profile)
    cases = [
        build_case(settings, entry, per_day=options.per_day, peak=options.peak, profile=profile)
        for entry in settings["cases"]
    ]
    scales = options.devices or SCALES
    made = tables(settings, cases, scales)
    if options.write:
        PAGE.write_text(filled(PAGE.read_text(), made))
    for name, table in made.items():
        print(f"{name}\n\n{table}\n")
    if options.json is not None:
        plans = {c.title: [dataclasses.asdict(plan(c, n)) for n in scales] for c in cases}
        options.json.write_text(json.dumps(plans, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Write docs/benchmarks.md from the results in docs/benchmarks/*.json: figures, targets, commands.

The table of docs/decisions/0007-transports.md comes from there too.

python -m benchmarks.page
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
TRANSPORTS = DOCS / "decisions/0007-transports.md"  # keeps a result's table

# Result file -> the question, and the target of each figure: (figure, comparison, bound).
QUESTIONS: dict[str, tuple[str, list[tuple[str, str, float]]]] = {
    "data_plane": (
        "How many messages per second, and how much server CPU for each, with an idle backbone?",
        [("ratio_to_default_serve", ">=", 30.0)],
    ),
    "field": (
        "How does the data plane compare with other servers, over sizes of messages and numbers of "
        "connections?",
        [("stream_cpu_over_mosec", "<=", 1.0), ("stream_rate_over_best_peer", ">=", 1.0)],
    ),
    "transports": (
        "Which transport costs the least server CPU per message, from HAProxy to the replica?",
        [("cheapest_other_over_ours", ">=", 1.0)],
    ),
    "batching": (
        "Does the batcher keep up at 80% of an emulated engine's capacity, and how late is it?",
        [("throughput_share", ">=", 0.97), ("p99_steps", "<=", 3.0)],
    ),
    "overload": (
        "How late is an answer, from 10% to 150% of capacity, and what is left of goodput at three "
        "times the capacity?",
        [
            ("p99_steps_at_80", "<=", 2.5),
            ("goodput_3x_over_saturation", ">=", 0.95),
            ("runs_limited_by_the_clients", "<=", 0.0),
        ],
    ),
    "capacity": (
        "Does the search for a cloud's capacity find what is known of an emulated engine, with the "
        "nominal time of a batch and with the measured one?",
        [("worst_relative_error", "<=", 0.03), ("worst_relative_error_calibrated", "<=", 0.03)],
    ),
    "capacity_p90": (
        "The same for a promise that is cheaper to know, p90, and an engine half as fast?",
        [("worst_relative_error", "<=", 0.03), ("worst_relative_error_calibrated", "<=", 0.03)],
    ),
    "fuzz": (
        "Does a replica survive 200,000 mutated messages, and serve good clients meanwhile as if "
        "nothing were?",
        [
            ("findings", "<=", 0.0),
            ("good_answers_wrong", "<=", 0.0),
            ("growth_from_50_percent_mib", "<=", 16.0),
        ],
    ),
    "added_latency": (
        "How much later is an answer than the bare forward, when nobody else asks?",
        [("added_p50_ms_null_engine", "<=", 1.0), ("added_p50_ms_block", "<=", 1.0)],
    ),
    "device_install": (
        "How large is a device's installation without torch, Ray and pyarrow, and how long does "
        "its import take?",
        [("plain_mb", "<=", 150.0), ("slim_mb", "<=", 150.0), ("import_s", "<=", 1.0)],
    ),
    "modes": (
        "What does the mode split cost the device, beside mix? (The worst of three bundles.)",
        [
            ("split_all_cpu_over_mix", "<=", 2.0),
            ("split_online_p50_over_mix", "<=", 1.1),
            ("uplink_over_mix_fashion-mnist-mix", "<=", 1.05),
            ("uplink_over_mix_fashion-mnist-one-round", "<=", 1.05),
            ("uplink_over_mix_speech-commands-mix", "<=", 1.05),
        ],
    ),
    "generator": (
        "What does a request cost whoever generates it, with this fleet and with other load "
        "generators?",
        [
            ("fleet_us", "<=", 60.0),
            ("stock_us", "<=", 60.0),
            ("cheapest_locust_over_fleet", ">=", 5.0),
        ],
    ),
    "ray_up": (
        "How long from `ray up` to the first answered request, where the packages are on the "
        "machines?",
        [("first_answer_s", "<=", 120.0), ("failed", "<=", 0.0), ("wrong", "<=", 0.0)],
    ),
    "fleet_scale": (
        "Do 10,000 devices on two cores send on time, beside the cloud that answers them?",
        [
            ("devices", ">=", 10_000.0),
            ("lag_p99_ms", "<=", 10.0),
            ("lost", "<=", 0.0),
            ("wrong", "<=", 0.0),
        ],
    ),
    "streams": (
        "What does a stream cost that is only there: memory in HAProxy and the replica, CPU to "
        "open it?",
        [],
    ),
    "omission": (
        "Does the report show a cloud that stalls for 2 s in a run of 30?",
        [("open_p99_over_stall", ">=", 0.8), ("closed_p99_over_stall", "<=", 0.1)],
    ),
    "failures": (
        "What do devices see when something in the cloud dies, hangs or is cut off?",
        [("wrong", "<=", 0.0), ("lost", "<=", 0.0), ("replica_back_s", "<=", 10.0)],
    ),
    "failures_hosts": (
        "What do devices see when a host of the cluster fails, or the network between its hosts?",
        [("wrong", "<=", 0.0), ("lost", "<=", 0.0)],
    ),
    "telemetry": (
        "What do metrics and traces cost a message, what a scrape a node, and is a shown "
        "utilisation true?",
        [
            ("metrics_on_over_off", "<=", 0.02),
            ("metrics_and_traces_over_off", "<=", 0.02),
            ("scrape_ms", "<=", 50.0),
            ("series_kept", "<=", 2000.0),
            ("utilisation_off_points", "<=", 2.0),
        ],
    ),
    "span_cost": (
        "What does a traced message cost a replica's event loop, and what the export of its spans?",
        [("loop_ours_over_tracer", "<=", 0.5)],
    ),
    "recording": (
        "What does the record of a run cost its generator, and what does reading it back take?",
        [("longest_look_ms", "<=", 10.0)],
    ),
    "autoscaling": (
        "How many requests miss their deadline, and for how many replica-hours, under three "
        "autoscalers?",
        [
            ("burst_20s_misses_over_ongoing", "<=", 0.99),
            ("burst_20s_misses_over_gpu", "<=", 0.99),
            ("burst_20s_hours_over_ongoing", "<=", 1.0),
            ("burst_20s_hours_over_gpu", "<=", 1.0),
            ("burst_90s_misses_over_ongoing", "<=", 0.99),
            ("burst_90s_misses_over_gpu", "<=", 0.99),
            ("burst_90s_hours_over_ongoing", "<=", 1.0),
            ("burst_90s_hours_over_gpu", "<=", 1.0),
        ],
    ),
    "upgrade": (
        "Does an upgrade cost a device anything, and is a bad version kept out?",
        [
            ("requests", ">=", 20_000.0),
            ("failed", "<=", 0.0),
            ("wrong", "<=", 0.0),
            ("stray", "<=", 0.0),
            ("mixed_version", "<=", 0.0),
            ("refused", ">=", 7.0),
        ],
    ),
    "scale_out": (
        "Does a cloud of n replicas carry n times what one carries, and what is the limit if not?",
        [("slow_least_share_of_linear", ">=", 0.9)],
    ),
    "scale_out_fast": (
        "The same with an engine so fast that two replicas need both cores: where does it end?",
        [("fast_least_share_of_linear", ">=", 0.9)],
    ),
    "saturation": (
        "How much of the engine's bare speed is served, clients on the same two cores?",
        [
            ("served_over_bare_1_threads", ">=", 0.7),
            ("served_over_bare_2_threads", ">=", 0.7),
            ("resnet18_served_over_bare_1_threads", ">=", 0.9),
            ("resnet18_served_over_bare_2_threads", ">=", 0.9),
            ("resnet18_served_over_bare_2_threads_without_clients", ">=", 0.9),
        ],
    ),
}
HEAD = """# Benchmarks

Written by `python -m benchmarks.page` from the results in [benchmarks/](benchmarks); do not edit.
Each result is one run of one script, everything it compares side by side in that run. The machines
are shared and noisy: trust ratios before rates. CPU time per message counts every process of the
server's side. How the clients were found not to be the limit stands with each table.
"""


def meets(value: float, comparison: str, bound: float) -> bool:
    """Whether a figure meets its target."""
    return value >= bound if comparison == ">=" else value <= bound


def cell(value: Any) -> str:
    """A value as the tables show it."""
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as the lines of a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return lines + ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]


def decision(text: str, result: dict[str, Any]) -> str:
    """The page of a decision with its first table replaced by the result's."""
    before, _, after = re.split(r"((?:^\|.*\n)+)", text, maxsplit=1, flags=re.MULTILINE)
    return before + "\n".join(table(result["rows"])) + "\n" + after


def section(name: str, result: dict[str, Any]) -> str:
    """One result as Markdown."""
    question, targets = QUESTIONS[name]
    rows, environment = result["rows"], result["environment"]
    lines = [f"## {question}", "", "| figure | measured | target |", "|---|---|---|"]
    bounds = {figure: (comparison, bound) for figure, comparison, bound in targets}
    for figure, value in result["figures"].items():
        target = ""
        if figure in bounds:
            comparison, bound = bounds[figure]
            verdict = "met" if meets(value, comparison, bound) else "**missed**"
            target = f"{comparison} {bound:g}: {verdict}"
        lines.append(f"| `{figure}` | {cell(value)} | {target} |")
    lines += ["", f"{result['title']}:", "", *table(rows)]
    lines += ["", *(f"- {note}" for note in result["notes"])]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    lines += [
        f"- `{environment['command']}` at commit {environment['commit']}",
        f"- {environment['cores']} cores of {environment['cpu']}, Python {environment['python']}, "
        f"{packages}",
        "",
    ]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    found = {
        path.stem: json.loads(path.read_text()) for path in (DOCS / "benchmarks").glob("*.json")
    }
    return "\n".join([HEAD, *(section(name, found[name]) for name in QUESTIONS if name in found)])


if __name__ == "__main__":
    TRANSPORTS.write_text(
        decision(
            TRANSPORTS.read_text(), json.loads((DOCS / "benchmarks/transports.json").read_text())
        )
    )
    (DOCS / "benchmarks.md").write_text(page())

"""The page of benchmarks says what the results say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import page, saturation


def test_the_page_is_what_the_results_give() -> None:
    assert (page.DOCS / "benchmarks.md").read_text() == page.page()


def test_the_decision_on_transports_has_the_result() -> None:
    result = json.loads((page.DOCS / "benchmarks/transports.json").read_text())
    text = page.TRANSPORTS.read_text()
    assert text == page.decision(text, result)


@pytest.mark.parametrize("name", page.QUESTIONS)
def test_every_question_has_its_result(name: str) -> None:
    result = json.loads((page.DOCS / "benchmarks" / f"{name}.json").read_text())
    for figure, _, _ in page.QUESTIONS[name][1]:
        assert isinstance(result["figures"][figure], float)
    environment = result["environment"]
    assert environment["command"].startswith("python ")
    assert environment["commit"]
    assert not environment["command"].startswith("python /"), "a path of one machine"


def test_a_missed_target_is_called_so() -> None:
    result = {
        "title": "t",
        "figures": {"ratio_to_default_serve": 29.9},
        "rows": [{"path": "ours", "messages/s": 1.0}],
        "notes": [],
        "environment": {
            "cpu": "c", "cores": 2, "python": "3", "packages": {}, "commit": "c", "command": "x",
        },
    }  # fmt: skip
    assert ">= 30: **missed**" in page.section("data_plane", result)
    result["figures"] = {"ratio_to_default_serve": 30.0}
    assert ">= 30: met" in page.section("data_plane", result)


def test_without_a_gpu_its_benchmark_says_so_in_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "benchmarks.gpu: found no CUDA device with nvidia-smi here, expected one\n"
    )


@pytest.mark.parametrize(
    ("client_share", "threads", "left"),
    [(0.0, 2, 1.0), (0.1, 2, 0.95), (1.0, 2, 0.5), (0.1, 1, 1.0), (1.0, 1, 1.0), (1.5, 1, 0.5)],
)
def test_what_clients_take_from_an_engine_on_two_cores(
    client_share: float, threads: int, left: float
) -> None:
    assert saturation.left_for_the_engine(client_share, threads, 2) == pytest.approx(left)


def test_the_engine_is_the_threads_that_worked_most() -> None:
    before, after = {1: 5.0, 2: 1.0, 3: 0.0}, {1: 6.0, 2: 9.0, 3: 0.5, 4: 7.0}
    assert saturation.engine_cpu_s(before, after, 1) == 8.0
    assert saturation.engine_cpu_s(before, after, 2) == 15.0  # one began meanwhile


def test_figures_are_medians_of_one_model_by_threads() -> None:
    def row(model: str, threads: int, ratio: float) -> dict[str, object]:
        corrected = {"served / bare, without clients": 2 * ratio}
        return {"model": model, "engine threads": threads, "served / bare": ratio, **corrected}

    rows = [row("a", 1, 0.5), row("a", 1, 0.9), row("a", 1, 0.8), row("a", 2, 0.1), row("b", 1, 9)]
    assert saturation.figures(rows, "a", "x_") == {
        "x_served_over_bare_1_threads": 0.8,
        "x_served_over_bare_1_threads_without_clients": 1.6,
        "x_served_over_bare_2_threads": 0.1,
        "x_served_over_bare_2_threads_without_clients": 0.2,
    }


def test_the_table_of_attacks_is_what_the_results_give(tmp_path: Path) -> None:
    from benchmarks import attacks

    result = json.loads((page.DOCS / "benchmarks/attacks.json").read_text())
    copy = tmp_path / "attacks.md"
    copy.write_text(attacks.PAGE.read_text())
    attacks.write_page(result["rows"], copy)
    assert copy.read_text() == attacks.PAGE.read_text()
    assert all(f"{row['value']:.3f}" in copy.read_text() for row in result["rows"])

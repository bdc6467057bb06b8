"""The page of benchmarks says what the results say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import page


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

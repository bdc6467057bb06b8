"""Rows, the file that keeps them, the claims that they judge, the page."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from datamix.errors import ConfigError
from edge.claims import OURS, PAPERS, Claim, judge, verdict
from edge.results import Row, put_rows, read_rows, with_baselines
from edge.results_page import render, write_page

REQUIRED = [
    "dataset",
    "method",
    "rounds",
    "group_size",
    "seed",
    "accuracy",
    "accuracy_unmixed",
    "accuracy_edge_only",
    "edge_flops_share",
    "bytes_per_inference",
    "command",
    "commit",
    "seconds",
]


def row(method: str = "linear", accuracy: float = 0.9, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "dataset": "cifar10", "method": method, "rounds": 3, "group_size": 8, "seed": 0,
        "accuracy": accuracy, "accuracy_unmixed": None, "accuracy_edge_only": None,
        "edge_flops_share": 0.15, "edge_flops_share_collapsed": 0.18,
        "bytes_per_inference": 20_000, "command": f"datamix experiment cifar10 --arms {method}",
        "commit": "0123456789ab", "seconds": 600.0, "label": method, "preset": "cifar10",
        "budget": "20 epochs", "inputs": (50_000, 10_000),
    }  # fmt: skip
    return Row(**{**values, **changes})


def both(**changes: Any) -> list[Row]:
    return [row("unmixed", 0.91, group_size=1, **changes), row("edge-only", 0.8, **changes)]


def test_a_row_has_the_keys_that_were_asked_for(tmp_path: Path) -> None:
    put_rows(tmp_path / "r.json", [row()])
    (values,) = json.loads((tmp_path / "r.json").read_text())
    assert list(values)[: len(REQUIRED)] == REQUIRED
    assert read_rows(tmp_path / "r.json") == [row()]


def test_rows_are_added_and_replaced_by_their_key(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "r.json"
    assert read_rows(path) == []
    put_rows(path, [row(), row(seed=1)])
    put_rows(path, [row(accuracy=0.5)])
    assert sorted((r.seed, r.accuracy) for r in read_rows(path)) == [(0, 0.5), (1, 0.9)]
    others = [
        row(group_size=4), row(law="gaussian"), row(budget="9 epochs"), row(noise_sigma=0.5),
        row(dataset="cifar100"), row(label="linear-b"), row(options={"rounds": 1}),
    ]  # fmt: skip
    assert len(put_rows(path, others)) == 2 + len(others)


def test_baselines_reach_every_row_of_their_experiment_whatever_came_first(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    put_rows(path, [row()])
    assert read_rows(path)[0].accuracy_unmixed is None
    put_rows(path, both())
    by_method = {r.method: r for r in read_rows(path)}
    for found in by_method.values():
        assert (found.accuracy_unmixed, found.accuracy_edge_only) == (0.91, 0.8)
    for other in ({"seed": 1}, {"budget": "1 epochs"}, {"preset": "x"}, {"dataset": "cifar100"}):
        assert with_baselines([row(**other), *both()])[0].accuracy_unmixed is None


SCRIPT = """
import sys
from pathlib import Path
from edge.results import put_rows
from tests.test_results import row
for seed in range(25):
    put_rows(Path(sys.argv[1]), [row(seed=seed, label=sys.argv[2])])
"""


def test_two_processes_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    root = Path(__file__).parents[1]
    writers = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(path), label], cwd=root)
        for label in ("a", "b")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(read_rows(path)) == 50


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read"),
        ("{}", "holds no list of objects"),
        ("[1]", "holds no list of objects"),
        ('[{"colour": 1}]', "has the key 'colour'"),
        ('[{"dataset": "x"}]', "is incomplete"),
    ],
)
def test_a_broken_file_is_refused_and_kept(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        put_rows(path, [row()])
    assert path.read_text() == text


def test_verdicts_follow_from_the_cases() -> None:
    assert verdict({}) == ("not testable here", "")
    assert verdict({"a": True, "b": True}) == ("holds", "")
    assert verdict({"a": False, "b": True}) == ("holds only for", "b")
    assert verdict({"a": False}) == ("does not hold", "")


def claims(rows: list[Row]) -> dict[tuple[str, str], Claim]:
    return {(c.claim.split()[0], c.about): c for c in judge(with_baselines(rows))}


def test_accuracy_is_judged_by_the_mean_drop_over_the_seeds() -> None:
    rows = [*both(), *both(seed=1)]
    rows += [row(accuracy=0.905), row(accuracy=0.899, seed=1)]  # 0.5 and 1.1 points
    rows += [row("datamix", 0.88, rounds=1), row("datamix", 0.905, rounds=1, group_size=2)]
    found = claims(rows)
    assert found["negligible", OURS].verdict == "holds"
    assert "cifar10 K = 8: +0.80" in found["negligible", OURS].evidence
    papers = found["negligible", PAPERS]
    assert (papers.verdict, papers.where) == ("holds only for", "cifar10 at K = 2")
    worse = [dataclasses.replace(r, accuracy=r.accuracy - 0.01) for r in rows if r.method in _OURS]
    assert claims([*both(), *both(seed=1), *worse])["negligible", OURS].verdict == "does not hold"
    assert claims(both())["negligible", OURS].verdict == "not testable here"


_OURS = ("linear", "datamix")


def test_the_recommended_rounds_speak_for_linear_blocks() -> None:
    rows = [*both(), row(accuracy=0.91), row(accuracy=0.5, rounds=1, label="one-round")]
    assert claims(rows)["negligible", OURS].verdict == "holds"


def test_flops_bytes_and_kinds_of_data_are_judged() -> None:
    speech = {"dataset": "speech-commands", "preset": "speech-commands"}
    rows = [*both(), *both(**speech), row(accuracy=0.91), row(accuracy=0.8, **speech)]
    found = claims(rows)
    assert found["under", OURS].verdict == "holds"
    assert found["under", PAPERS].verdict == "not testable here"
    assert found["small", OURS].verdict == "holds"  # 6.5 and 0.6 bytes for each
    assert found["works", OURS].where == "vision"
    assert claims(rows[:5])["works", OURS].verdict == "not testable here"
    heavy = dataclasses.replace(rows[4], edge_flops_share_collapsed=0.2, bytes_per_inference=40_000)
    found = claims([*rows[:4], heavy, rows[5]])
    assert found["under", OURS].where == "speech-commands at K = 8"
    assert found["small", OURS].where == "speech-commands"
    assert found["the", ""].verdict == "does not hold"  # the last: the cloud cannot invert


def test_the_page_shows_every_figure(tmp_path: Path) -> None:
    put_rows(
        tmp_path / "results.json",
        [*both(), row(accuracy=0.905), *both(seed=1), row(accuracy=0.899, seed=1)],
    )
    write_page(tmp_path / "results.json", tmp_path / "results.md", tmp_path / "results")
    text = (tmp_path / "results.md").read_text()
    assert "90.20 (89.90 to 90.50)" in text
    assert "| +0.80 |" in text
    assert "15.0% / 18.0%" in text
    assert "![cifar10](results/cifar10.svg)" in text
    assert "`datamix experiment cifar10 --arms linear`" in text
    assert "**does not hold**" in text
    assert str(tmp_path) not in text
    picture = (tmp_path / "results" / "cifar10.svg").read_bytes()
    write_page(tmp_path / "results.json", tmp_path / "results.md", tmp_path / "results")
    assert (tmp_path / "results" / "cifar10.svg").read_bytes() == picture
    with pytest.raises(ConfigError, match="has no rows"):
        write_page(tmp_path / "none.json", tmp_path / "p.md", tmp_path / "p")


def attacked(attack: str, value: float, **changes: Any) -> dict[str, Any]:
    return {
        "attack": attack, "metric": "reid_top1", "mode": "bounded", "dataset": "cifar10",
        "bundle": "cifar10-bounded", "sigma": 2, "value": value, "floor": 0.02, "bound_bits": 252.4,
        **changes,
    }  # fmt: skip


def test_the_curve_of_bounded_has_bits_accuracy_and_attacks_in_one_table(tmp_path: Path) -> None:
    noisy = [
        row("bounded", accuracy, seed=seed, noise_sigma=2.0, bits_per_input=252.4, group_size=4)
        for seed, accuracy in ((0, 0.86), (1, 0.84))
    ]
    put_rows(tmp_path / "results.json", [*both(), *both(seed=1), *noisy])
    attacks = [
        attacked("span", 0.9),
        attacked("repeats", 0.97, repeats=16, bound_bits=4038.4),
        attacked("span", 0.5, bundle="cifar10-mix", sigma=4, bound_bits=68.57),
        attacked("span", 0.1, mode="split"),
    ]
    (tmp_path / "attacks.json").write_text(json.dumps({"rows": attacks}))
    page = tmp_path / "results.md"
    write_page(tmp_path / "results.json", page, tmp_path / "results", tmp_path / "attacks.json")
    text = page.read_text()
    line = "| cifar10 | bounded | 2 | 252.4 | 85.00 | 80.00 | 0.90 (0.02) |  | 0.97 (0.02) |  |  |"
    assert line in text
    assert "| cifar10 | mix | 4 | 68.57 |  |  | 0.50 (0.02) |  |  |  |  |" in text
    assert "![bounded](results/cifar10-bounded.svg)" in text
    assert (tmp_path / "results" / "cifar10-bounded.svg").exists()
    write_page(tmp_path / "results.json", page, tmp_path / "results", tmp_path / "none.json")
    assert "| cifar10 | bounded | 2 | 252.4 | 85.00 | 80.00 |  |  |  |  |  |" in page.read_text()
    (tmp_path / "attacks.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no rows of attacks"):
        write_page(tmp_path / "results.json", page, tmp_path, tmp_path / "attacks.json")
    assert "bounded" not in render([row(), *both()], "results.json", {})


def test_tables_are_tables() -> None:
    text = render([row(), *both()], "results.json", {})
    for block in text.split("\n\n"):
        if block.startswith("|"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.count("|") for line in lines}) == 1

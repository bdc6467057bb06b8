"""What the README shows runs: its Python, its commands, its links."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from cluster import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
URL, BUNDLE = "http://127.0.0.1:8000", "bundles/fashion-mnist-mix"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The command lines of a text's sh blocks, as words, comments cut off."""
    lines = "\n".join(blocks(text, "sh")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parse(words: list[str]) -> None:
    """Parse as `datamix` would, without running anything; exits or raises on a wrong usage."""
    command: Any = typer.main.get_command(cli.app)
    context = command.make_context("datamix", list(words), resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


COMMANDS = commands(README)
DATAMIX = [words[1:] for words in COMMANDS if words[0] == "./dev" and words[1] not in ("test",)]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = [
    words[1:]
    for page in PAGES[1:]
    for line in "\n".join(blocks(page.read_text(), "sh")).replace("\\\n", " ").splitlines()
    if re.match(r"\./dev (?!check|lock|test)", line)
    for words in [shlex.split(line, comments=True)]
]


def test_the_readme_has_what_is_tested_here() -> None:
    assert len(blocks(README, "python")) == 1
    assert [words[0] for words in COMMANDS].count("./dev") == len(COMMANDS) - 1
    assert {words[0] for words in DATAMIX} >= {"demo", "serve", "doctor", "evaluate", "simulate"}


@pytest.mark.parametrize(
    "words", [w for w in (*DATAMIX, *ELSEWHERE) if "--help" not in w], ids=" ".join
)
def test_commands_are_well_formed(words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize("words", [["nope"], ["doctor", "--nope"], ["evaluate"]], ids=" ".join)
def test_a_malformed_command_is_found(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such (command|option)|Missing (option|parameter)"):
        parse(words)


@pytest.mark.parametrize(
    "words", [w for w in DATAMIX if "--help" in w or w[0] == "evaluate"], ids=" ".join
)
def test_commands_that_need_no_cluster_run(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_bundle_of_the_readme_is_healthy() -> None:
    from cluster.doctor import check_bundle

    check = check_bundle(str(ROOT / BUNDLE))
    assert check.status == "ok", check


def test_ray_reads_the_file_that_the_readme_names() -> None:
    (ray_up,) = [words for words in COMMANDS if words[0] == "ray"]
    assert ray_up[:2] == ["ray", "up"] and (ROOT / ray_up[2]).is_file()


@pytest.mark.cluster
def test_the_python_runs_against_a_cluster(
    cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks(README, "python")
    assert URL in code and BUNDLE in code
    code = code.replace(URL, cluster.url).replace(BUNDLE, str(cluster.bundle))
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and names["outputs"].shape == (10, 10)
    right = (names["outputs"].argmax(axis=1) == names["sample"].labels[:10]).sum()
    assert right >= 8  # the bundle is right nine times out of ten


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    assert [x for x in links if "://" not in x and not (page.parent / x).exists()] == []


def test_every_folder_is_explained() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    folders = {line.split("/")[0] for line in files.stdout.splitlines() if "/" in line} - {".ci"}
    assert folders - set(re.findall(r"^\| \[(\w+)/\]", README, re.MULTILINE)) == set()

"""./dev under hostile conditions, with fakes on PATH: no network, no real install."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = [
    "sh",
    "env",
    "cat",
    "cksum",
    "dirname",
    "basename",
    "awk",
    "df",
    "flock",
    "rm",
    "mv",
    "mkdir",
]
TOOLS += ["chmod", "sleep", "bash", "mktemp", "cp", "sed", "grep"]

# Stands in for every python: says yes to the version check and "makes" a venv whose python is
# itself. Each pip install leaves a line when it starts and one when it ends.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
*sys.version_info*) exit ${FAKE_TOO_OLD:-0} ;;
-V) echo "Python 3.9.2" ;;
*ensurepip*) exit ${FAKE_NO_VENV:-0} ;;
"-m venv "*) mkdir -p "$3/bin" && cat "$0" >"$3/bin/python" && chmod +x "$3/bin/python" ;;
"-m pip install "*)
    echo "start $FAKE_NAME" >>"$FAKE_LOG"
    sleep "${FAKE_PIP_SECONDS:-0}"
    [ "${FAKE_PIP_FAILS:-0}" = 0 ] || exit 1
    printf '#!/bin/sh\\necho "datamix $*"\\n' >"${0%/*}/datamix"
    chmod +x "${0%/*}/datamix"
    echo "end $FAKE_NAME" >>"$FAKE_LOG"
    ;;
"-m piptools compile "*)
    while [ "$1" != --output-file ]; do shift; done
    printf "$FAKE_LOCK" >"$2"
    ;;
*) echo "python $*" ;;
esac
case "$*" in *"${FAKE_FAILS_FOR:-none}"*) exit 7 ;; esac
"""


class House:
    """A copy of the script in a directory of its own, and the only PATH it gets to see."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a clone"  # a space, since a stranger's path may have one
        self.bin = root / "bin"
        self.log = root / "log"
        self.root.mkdir()
        self.bin.mkdir()
        self.log.touch()
        shutil.copy(ROOT / "dev", self.root)
        for name in ("pyproject.toml", "constraints.txt"):
            (self.root / name).write_text("# pins\n")
        for name in TOOLS:
            found = shutil.which(name)
            assert found, f"{name} is needed to test ./dev"
            (self.bin / name).symlink_to(found)

    def put(self, name: str, script: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "dev", *arguments],
            env={"PATH": str(self.bin), "FAKE_LOG": str(self.log), "FAKE_NAME": "a", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        process = self.start(*arguments, env=env)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def installs(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def house(tmp_path: Path) -> House:
    house = House(tmp_path)
    house.put("python3", FAKE_PYTHON)
    return house


def sentence(err: str) -> str:
    """The last line of stderr, which must be the script's own."""
    last = err.splitlines()[-1]
    assert last.startswith("dev: ") and last.endswith("."), err
    return last


def test_installs_once_then_runs_any_command(house: House) -> None:
    assert house.run("serve", "--port", "1")[:2] == (0, "datamix serve --port 1\n")
    assert house.run("demo")[:2] == (0, "datamix demo\n")
    assert house.run("test", "-k", "x y")[:2] == (0, "python -m pytest -k x y\n")
    assert house.installs() == ["start a", "end a"]


ALONE = "cluster or hosts or monitoring"


@pytest.mark.parametrize("failing", ["", f"not ({ALONE})", ALONE])
def test_all_tests_are_two_runs_and_either_fails_both(house: House, failing: str) -> None:
    code, out, _ = house.run("test", FAKE_FAILS_FOR=f"-m {failing}" if failing else "none")
    assert [line.split(" --durations")[0].split(" -n ")[0] for line in out.splitlines()] == [
        f"python -m pytest -m not ({ALONE})",
        f"python -m pytest -m {ALONE}",
    ]
    assert code == (7 if failing else 0)


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_installs_again_when_the_pins_change(house: House, name: str) -> None:
    house.run("demo")
    (house.root / name).write_text("# other pins\n")
    assert house.run("demo", FAKE_NAME="b")[0] == 0
    assert house.installs() == ["start a", "end a", "start b", "end b"]


LOCK = "a==1\n    # via b\ndatamix-cluster @ file:///here\n    # via\n    #   us\ntorch==2.13.0%s\n"


def test_lock_writes_what_fits_every_machine(house: House) -> None:
    code, _, err = house.run("lock", FAKE_LOCK=LOCK % "+cpu")
    assert code == 0, err
    assert (house.root / "constraints.txt").read_text() == "a==1\n    # via b\ntorch==2.13.0\n"


def test_lock_changes_nothing_where_it_refuses(house: House) -> None:
    code, _, err = house.run("lock", FAKE_LOCK=LOCK % "\nnvidia-cublas==13.0")
    assert code == 1
    assert "lock with torch's CPU build" in sentence(err)
    assert (house.root / "constraints.txt").read_text() == "# pins\n"


def test_no_command_is_a_usage_error(house: House) -> None:
    code, out, err = house.run()
    assert (code, out) == (2, "") and err.startswith("usage: ./dev")
    assert house.run("--help")[0] == 0
    assert house.installs() == []


def test_no_python(house: House) -> None:
    (house.bin / "python3").unlink()
    code, _, err = house.run("demo")
    assert code == 1 and "no Python found, expected Python 3.11" in sentence(err)


def test_python_too_old(house: House) -> None:
    code, _, err = house.run("demo", FAKE_TOO_OLD="1")
    assert code == 1 and "Python 3.9.2 found, expected Python 3.11" in sentence(err)
    assert not (house.root / ".venv").exists()


def test_a_newer_python_is_preferred_to_an_old_python3(house: House) -> None:
    house.put("python3.12", FAKE_PYTHON)
    house.put("python3", "#!/bin/sh\nexit 1\n")
    assert house.run("demo")[0] == 0


def test_no_venv_module(house: House) -> None:
    code, _, err = house.run("demo", FAKE_NO_VENV="1")
    assert code == 1 and "apt install python3-venv" in sentence(err)
    assert not (house.root / ".venv").exists()


def test_no_disk_space_before_the_install(house: House) -> None:
    house.put("df", "#!/bin/sh\necho head\necho disk 9 9 123000 9 /\n")
    code, _, err = house.run("demo")
    assert code == 1 and "123 MB free" in sentence(err) and "at least 4000 MB" in err
    assert house.installs() == []


def test_no_disk_space_during_the_install(house: House) -> None:
    house.put("df", '#!/bin/sh\necho head\n[ -s "$FAKE_LOG" ] && n=9 || n=5000000\necho d 9 9 $n 9')
    code, _, err = house.run("demo", FAKE_PIP_FAILS="1")
    assert code == 1 and "is full" in sentence(err)


def test_a_failed_install_is_retried_from_scratch(house: House) -> None:
    code, _, err = house.run("demo", FAKE_PIP_FAILS="1")
    assert code == 1 and "pip could not install" in sentence(err)
    (house.root / ".venv" / "half-written").touch()
    assert house.run("demo")[:2] == (0, "datamix demo\n")
    assert not (house.root / ".venv" / "half-written").exists()


def test_no_compiler_is_mentioned_when_the_install_fails(house: House) -> None:
    assert "build-essential" in sentence(house.run("demo", FAKE_PIP_FAILS="1")[2])
    house.put("cc", "#!/bin/sh\n")
    assert "build-essential" not in sentence(house.run("demo", FAKE_PIP_FAILS="1")[2])


def test_a_killed_install_leaves_no_stale_lock(house: House) -> None:
    killed = house.start("demo", env={"FAKE_PIP_SECONDS": "1"})
    while not house.installs():
        assert killed.poll() is None
    killed.kill()
    killed.communicate()
    code, out, err = house.run("demo", FAKE_NAME="b")
    assert (code, out) == (0, "datamix demo\n"), err
    assert "afresh" in err and house.installs()[-2:] == ["start b", "end b"]


def test_two_at_once_install_once(house: House) -> None:
    slow = {"FAKE_PIP_SECONDS": "0.3"}
    both = [house.start("demo", env={**slow, "FAKE_NAME": name}) for name in "ab"]
    assert [(p.communicate(timeout=30)[0], p.returncode) for p in both] == [
        ("datamix demo\n", 0),
        ("datamix demo\n", 0),
    ]
    assert len(house.installs()) == 2


def test_a_moved_clone_is_installed_afresh(house: House) -> None:
    house.run("demo")
    house.root = house.root.rename(house.root.with_name("moved"))
    code, _, err = house.run("demo", FAKE_NAME="b")
    assert code == 0 and "afresh" in err
    assert house.installs()[-1] == "end b"


def test_a_venv_that_somebody_else_made_is_kept(house: House) -> None:
    subprocess.run(
        ["sh", house.bin / "python3", "-m", "venv", house.root / ".venv"],
        check=True,
        env={"PATH": os.environ["PATH"]},
    )
    (house.root / ".venv" / "theirs").touch()
    house.run("demo", FAKE_PIP_FAILS="1")
    assert house.run("demo")[0] == 0
    assert (house.root / ".venv" / "theirs").exists()


def test_the_script_is_plain_sh() -> None:
    dash = shutil.which("dash") or "sh"
    assert subprocess.run([dash, "-n", ROOT / "dev"]).returncode == 0
    assert (ROOT / "dev").read_text().startswith("#!/bin/sh\n")

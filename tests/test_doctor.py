"""Every check of the doctor in a case where it fires and in one where it does not."""

import json
import socket
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import cli, doctor
from cluster.doctor import Check
from datamix.bundle import load_device
from datamix.errors import BundleError, ConfigError

BOTH = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


# ------------------------------------------------------------------ software


def test_python() -> None:
    assert doctor.check_python((3, 11)).status == "ok"
    old = doctor.check_python((3, 10))
    assert old.status == "fail" and "3.11" in old.fix


def test_pins_are_read_from_the_constraints() -> None:
    pins = doctor.read_pins(doctor.CONSTRAINTS)
    assert set(doctor.PACKAGES) <= set(pins)
    assert doctor.read_pins(Path("/nowhere")) == {}


def test_packages_against_the_pins() -> None:
    pins = dict.fromkeys(doctor.PACKAGES, "2.0")
    installed = {**pins, "ray": "2.1", "numpy": "1.9"}
    del installed["picows"]
    found = statuses(list(doctor.check_packages(pins, installed.get)))
    assert found.pop("package ray") == "fail"
    assert found.pop("package numpy") == "warn"
    assert found.pop("package picows") == "fail"
    assert set(found.values()) == {"ok"} and len(found) == len(doctor.PACKAGES) - 3


def test_the_installed_packages_are_the_pinned_ones() -> None:
    found = doctor.check_packages(doctor.read_pins(doctor.CONSTRAINTS), doctor.installed_version)
    assert [check for check in found if check.status != "ok"] == []


def test_haproxy_binary(tmp_path: Path) -> None:
    assert doctor.check_haproxy_binary(doctor.find_haproxy).status == "ok"

    def none() -> str:
        raise FileNotFoundError("No HAProxy binary found.")

    assert doctor.check_haproxy_binary(none) == Check(
        "HAProxy binary",
        "fail",
        "No HAProxy binary found.",
        "pip install -c constraints.txt 'ray[serve]' (its HAProxy is for Linux)",
    )
    broken = tmp_path / "haproxy"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    assert "exits with 3" in doctor.check_haproxy_binary(lambda: str(broken)).found
    broken.write_bytes(b"\x7fELF of another machine")
    assert doctor.check_haproxy_binary(lambda: str(broken)).status == "fail"


# ------------------------------------------------------------------ this machine


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        (BOTH, "ok"),
        ({}, "ok"),
        (BOTH | {"RAY_SERVE_ENABLE_HA_PROXY": "true"}, "fail"),
        ({"RAY_SERVE_ENABLE_HA_PROXY": "1"}, "fail"),
        ({"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}, "fail"),
    ],
)
def test_mode(environment: dict[str, str], status: str) -> None:
    check = doctor.check_mode(environment)
    assert check.status == status and bool(check.fix) == (status == "fail")


def test_ports_come_from_rays_variables() -> None:
    assert [p for p, _ in doctor.serve_ports(8000, {})] == [8000, 9101, 8404, 30000]
    moved = {"RAY_SERVE_HAPROXY_STATS_PORT": "8405"}
    assert [p for p, _ in doctor.serve_ports(81, moved)] == [81, 9101, 8405, 30000]
    with pytest.raises(ConfigError, match="STATS_PORT is 'x', expected a port"):
        doctor.serve_ports(8000, {"RAY_SERVE_HAPROXY_STATS_PORT": "x"})


def test_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        front = doctor.check_port(port, "the front door")
        assert front.status == "fail" and "--port" in front.fix
        assert "METRICS_PORT" in doctor.check_port(port, "HAProxy's metrics").fix
    assert doctor.check_port(port, "the front door").status == "ok"


@pytest.mark.parametrize(
    ("devices", "limit", "status"),
    [(300, 1024, "ok"), (400, 1024, "fail"), (2000, 1_048_576, "ok"), (2000, sys.maxsize, "ok")],
)
def test_descriptors(devices: int, limit: int, status: str) -> None:
    assert doctor.check_descriptors(devices, limit).status == status


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("free", "shared", "disk"),
    [
        (50 << 20, "warn", "fail"),
        (200 << 20, "ok", "fail"),
        (2 << 30, "ok", "warn"),
        (50 << 30, "ok", "ok"),
    ],
)
def test_shared_memory_and_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, shared: str, disk: str
) -> None:
    total = 100 << 30
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(total, total - free, free))
    assert doctor.check_shared_memory(tmp_path).status == shared
    assert doctor.check_disk(tmp_path).status == disk


def test_no_shared_memory_at_all(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path / "none").status == "warn"


# ------------------------------------------------------------------ bundle and cloud


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from datamix.bundle import ArchitectureSpec, ImagePreprocessing, save_bundle
    from datamix.models import Architecture, build

    spec = ArchitectureSpec(name="convnet", options={"n_blocks": 1})
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    save_bundle(
        path,
        build(Architecture(spec.name, spec.options)),
        name="tiny",
        version="1",
        mode="mix",
        group_size=4,
        architecture=spec,
        preprocessing=ImagePreprocessing(
            kind="image", input_shape=(1, 28, 28), mean=(0.0,), std=(1.0,)
        ),
        class_names=tuple("abcdefghij"),
        tolerance=0.01,
        metrics={},
    )
    return path


def copied(bundle: Path, target: Path) -> Path:
    target.mkdir()
    for file in bundle.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("file", ["backbone.safetensors", "device.safetensors"])
def test_bundle_with_one_bit_changed(bundle: Path, tmp_path: Path, file: str) -> None:
    assert doctor.check_bundle(str(bundle)).status == "ok"
    changed = copied(bundle, tmp_path / "b")
    body = bytearray((changed / file).read_bytes())
    body[-1] ^= 1
    (changed / file).write_bytes(body)
    check = doctor.check_bundle(str(changed))
    assert check.status == "fail" and f"{file}: sha256" in check.found


def test_bundle_of_a_cloud_node(bundle: Path, tmp_path: Path) -> None:
    node = copied(bundle, tmp_path / "b")
    (node / "device.safetensors").unlink()
    assert doctor.check_bundle(str(node)).status == "warn"
    (node / "backbone.safetensors").unlink()
    assert doctor.check_bundle(str(node)).status == "fail"
    with pytest.raises(BundleError):
        load_device(node)


@contextmanager
def front(server: str | None, health: int, ready: int) -> Iterator[str]:
    """An HTTP server that answers as HAProxy (no Server header) or as somebody else would."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(health if self.path == "/-/healthz" else ready)
            if server is not None:
                self.send_header("Server", server)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("server", "health", "ready", "cloud", "proxy"),
    [
        (None, 200, 200, "ok", "ok"),
        (None, 503, 503, "fail", "ok"),
        ("uvicorn", 200, 200, "ok", "fail"),
        ("nginx", 404, 404, "fail", "warn"),
    ],
)
def test_cloud(server: str | None, health: int, ready: int, cloud: str, proxy: str) -> None:
    with front(server, health, ready) as url:
        found = statuses(doctor.check_cloud(url + "/"))
    assert found == {"cloud": cloud, "HAProxy in front": proxy}


def test_no_cloud() -> None:
    with front(None, 200, 200) as url:
        pass
    (check,) = doctor.check_cloud(url)
    assert check.status == "fail" and "refused" in check.found
    with pytest.raises(ConfigError, match="expected http://host:port"):
        doctor.check_cloud("ws://127.0.0.1")


@pytest.mark.parametrize(
    ("url", "without_token", "expected"),
    [
        ("http://127.0.0.1:8000", 200, {}),
        ("http://localhost", 200, {}),
        ("http://[::1]:8000", 200, {}),
        ("http://10.0.0.1:8000", 200, {"tokens": "warn", "TLS": "warn"}),
        ("http://10.0.0.1:8000", 401, {"tokens": "ok", "TLS": "warn"}),
        ("https://cloud.example", 200, {"tokens": "warn", "TLS": "ok"}),
        ("https://cloud.example", 401, {"tokens": "ok", "TLS": "ok"}),
        ("https://cloud.example", 503, {"TLS": "ok"}),  # what is wrong then, another check says
    ],
)
def test_who_gets_in(url: str, without_token: int, expected: dict[str, str]) -> None:
    found = list(doctor.check_entrance(url, without_token))
    assert statuses(found) == expected
    assert all(bool(check.fix) == (check.status == "warn") for check in found)


def test_a_cloud_is_asked_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def check(url: str, without_token: int | None) -> list[Check]:
        asked.append(without_token)
        return []

    monkeypatch.setattr(doctor, "check_entrance", check)
    with front(None, 200, 401) as url:
        doctor.check_cloud(url)
    assert asked == [401]


@pytest.mark.cluster
def test_a_real_cloud_has_haproxy_in_front(cluster: Any) -> None:
    found = statuses(doctor.diagnose(url=cluster.url, bundle=str(cluster.bundle), devices=10))
    assert found["cloud"] == found["HAProxy in front"] == found["bundle"] == "ok"


# ------------------------------------------------------------------ as a whole


def test_diagnose_looks_at_ports_or_at_a_cloud(bundle: Path) -> None:
    local = statuses(doctor.diagnose(bundle=str(bundle), devices=10))
    assert {"port 8000", "HAProxy mode", "disk", "shared memory", "file descriptors"} <= set(local)
    assert local["bundle"] == "ok"
    with front(None, 200, 200) as url:
        remote = statuses(doctor.diagnose(url=url, devices=10))
    assert remote["cloud"] == remote["HAProxy in front"] == "ok"
    assert not any(name.startswith("port ") for name in remote)


@pytest.mark.parametrize("wrong", [{"devices": 0}, {"port": 0}, {"port": 70_000}])
def test_diagnose_refuses(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        doctor.diagnose(devices=wrong.get("devices", 1), port=wrong.get("port", 8000))


def test_the_table_shows_markup_as_text() -> None:
    console = Console(record=True, width=100)
    doctor.show([Check("x", "fail", "pip install 'ray[serve]'", "use [cloud]")], console)
    text = console.export_text()
    assert "ray[serve]" in text and "-> use [cloud]" in text


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    code = stopped.value.code
    assert isinstance(code, int)
    return code


def test_the_command_exits_1_on_a_failure(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    arguments = ["doctor", "--bundle", str(tmp_path), "--devices", "10", "--json", str(report)]
    assert run(*arguments) == 1
    body = json.loads(report.read_text())
    assert body["ok"] is False
    assert [c["status"] for c in body["checks"] if c["name"] == "bundle"] == ["fail"]
    assert "no manifest.json" in capsys.readouterr().out


def test_the_command_exits_0_when_healthy(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with front(None, 200, 200) as url:
        assert run("doctor", "--bundle", str(bundle), "--url", url, "--devices", "10") == 0
    assert "hashes verified" in capsys.readouterr().out


def test_errors_are_one_sentence_with_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", "--port", "0") == 2
    assert capsys.readouterr().err == "datamix: port is 0, expected 1 to 65535\n"
    assert run("doctor", "--devices", "10", "--json", str(tmp_path)) == 2
    assert "cannot be written: Is a directory" in capsys.readouterr().err
    assert run("doctor", "--no-such-option") == 2
    assert run("--version") == 0


@pytest.mark.parametrize(("error", "code"), [(BundleError("b"), 1), (KeyboardInterrupt(), 130)])
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(**_: object) -> list[Check]:
        raise error

    monkeypatch.setattr(doctor, "diagnose", fail)
    assert run("doctor") == code


@pytest.mark.parametrize("name", ["torch", "ray"])
def test_a_missing_extra_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def fail(**_: object) -> list[Check]:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(doctor, "diagnose", fail)
    assert run("doctor") == 1
    assert f"needs {name}, which is not installed" in capsys.readouterr().err


def test_a_module_that_should_be_there_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> list[Check]:
        raise ModuleNotFoundError("No module named 'edge.nope'", name="edge.nope")

    monkeypatch.setattr(doctor, "diagnose", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])

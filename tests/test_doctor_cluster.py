"""Every trap of the cluster's doctor in a case where it fires, and all of them at rest."""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli, doctor, doctor_checks, doctor_cluster, doctor_facts, doctor_node
from cluster.doctor import Check
from cluster.doctor_facts import Facts
from datamix.errors import ConfigError, Unavailable
from tests.served import Served

ROOT = Path(__file__).parents[1]
BOTH = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
SET = BOTH | {"RAY_SERVE_HAPROXY_MAXCONN": "65536", "RAY_AUTH_MODE": "disabled"}
BUNDLE = "bundles/fashion-mnist-mix"


def node_facts(name: str) -> dict[str, Any]:
    return {
        "hostname": name,
        "python": "3.11.7",
        "packages": dict.fromkeys(doctor.PACKAGES, "1.0") | {"ray": "2.60.0"},
        "code": {"datamix": "aaaaaaaaaaaa", "deployments": "bbbbbbbbbbbb"},
        "edge": "",
        "environment": dict(SET),
        "actors": [
            {"kind": "controller", "environment": dict(SET)},
            {"kind": "HAProxy's manager", "environment": dict(SET)},
            {"kind": "replica", "environment": dict(SET)},
        ],
        "haproxy": {"maxconn": 65536, "threads": 8, "descriptors": 262144},
        "descriptors": 262144,
        "cpus": 8,
        "gpu_driver": "570.86.15",
        "local_ports": 28232,
        "listeners": {"8000": "haproxy"},
        "front_door": {"status": 200, "server": "", "reason": ""},
        "token_file": False,
        "disk": {"folder": "/tmp/ray", "total": 100 << 30, "free": 50 << 30},
        "shared_memory": {"folder": "/dev/shm", "total": 10 << 30, "free": 10 << 30},
        "bundles": {BUNDLE: {"digest": "cccccccccccc", "error": "", "device_files": []}},
    }


def healthy() -> dict[str, Any]:
    """Two nodes with a GPU each, a door on both, an application that does well."""
    nodes = [
        {
            "name": name,
            "alive": True,
            "head": name == "10.0.0.1",
            "resources": {"CPU": 8.0, "GPU": 1.0},
            "front_door": True,
            "facts": node_facts(name),
            "error": "",
            "clock_s": 0.002,
            "clock_error_s": 0.001,
        }
        for name in ("10.0.0.1", "10.0.0.2")
    ]
    deployment = {
        "name": "Backbone",
        "status": "HEALTHY",
        "message": "",
        "max_ongoing_requests": 100_000,
        "health_check_period_s": 1.0,
        "health_check_timeout_s": 10.0,
        "policy": "deployments.policy:PredictedWait",
        "delays_s": [0.0, 0.0],
        "replicas": 2,
        "resources": {"CPU": 2.0, "GPU": 1.0},
    }
    return {
        "devices": 10_000,
        "shell": {},
        "nodes": nodes,
        "serve": {
            "error": "",
            "host": "0.0.0.0",
            "port": 8000,
            "proxies": {"1": "HEALTHY", "2": "HEALTHY"},
            "applications": [
                {
                    "name": "datamix",
                    "status": "RUNNING",
                    "message": "",
                    "bundles": [BUNDLE],
                    "deployments": [deployment],
                }
            ],
        },
    }


def changed(path: str, value: Any, facts: dict[str, Any] | None = None) -> Facts:
    """Healthy facts but for one: a path of keys and positions, parted by dots."""
    whole: Any = copy.deepcopy(healthy() if facts is None else facts)
    place = whole
    *way, last = path.split(".")
    for key in way:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = value
    result: Facts = whole
    return result


def judged(facts: Facts) -> dict[str, Check]:
    return {check.name: check for check in doctor_cluster.judge(facts)}


def test_a_healthy_cluster_is_healthy() -> None:
    facts: Any = healthy()
    assert [check for check in doctor_cluster.judge(facts) if check.status != "ok"] == []


def test_names_are_unique_and_fixes_are_there() -> None:
    names = [trap.name for trap in doctor_cluster.TRAPS]
    assert len(set(names)) == len(names)
    assert all(trap.fix and trap.fires for trap in doctor_cluster.TRAPS)


FIRST, DEPLOYED = "nodes.0.facts.", "serve.applications.0.deployments.0."
# The trap, what is wrong, how bad that is, and a word that must be in what was found.
CASES: list[tuple[str, str, Any, str, str]] = [
    ("Serve", "serve.error", "it does not run on this cluster", "fail", "does not run"),
    ("Serve", "serve.applications", [], "fail", "no application"),
    ("Serve", "serve.applications.0.status", "DEPLOY_FAILED", "fail", "DEPLOY_FAILED"),
    ("Serve", DEPLOYED + "status", "UNHEALTHY", "fail", "datamix/Backbone is UNHEALTHY"),
    ("Serve", "serve.proxies.2", "UNHEALTHY", "fail", "1 of 2 front doors"),
    ("HAProxy variables", FIRST + "environment", {}, "fail", "ENABLE_HA_PROXY was not 1"),
    (
        "HAProxy variables",
        FIRST + "environment.RAY_SERVE_THROUGHPUT_OPTIMIZED",
        "true",
        "fail",
        "THROUGHPUT_OPTIMIZED was not 1 when Ray was started on 10.0.0.1",
    ),
    (
        "Serve's environment",
        FIRST + "actors.0.environment",
        {},
        "fail",
        "the controller on 10.0.0.1 differs in",
    ),
    (
        "Serve's environment",
        FIRST + "actors.2.environment.RAY_SERVE_ENABLE_HA_PROXY",
        "0",
        "fail",
        "the replica on 10.0.0.1 differs in RAY_SERVE_ENABLE_HA_PROXY",
    ),
    (
        "same settings",
        FIRST + "environment.RAY_SERVE_HAPROXY_MAXCONN",
        "4096",
        "warn",
        "4096 on 10.0.0.1; 65536 on 10.0.0.2",
    ),
    ("HAProxy in front", FIRST + "front_door.server", "uvicorn", "fail", "Python proxy"),
    ("HAProxy in front", FIRST + "front_door.status", 0, "fail", "nobody answers on 10.0.0.1"),
    ("HAProxy in front", FIRST + "haproxy", None, "fail", "no HAProxy runs on 10.0.0.1"),
    ("HAProxy's connections", "devices", 200_000, "fail", "131072 devices in, of 200000"),
    ("HAProxy's connections", FIRST + "haproxy.maxconn", 4096, "warn", "share (5000) on 10.0.0.1"),
    ("file descriptors", FIRST + "haproxy.descriptors", 4096, "fail", "1558 devices of 5000"),
    ("ports to replicas", FIRST + "local_ports", 2000, "fail", "2000 ports on 10.0.0.1 for 2500"),
    ("HAProxy's threads", FIRST + "haproxy.threads", 16, "warn", "16 threads on 8 processors"),
    ("versions", FIRST + "python", "3.11.9", "fail", "Python 3.11.7 on 10.0.0.2; 3.11.9 on"),
    ("versions", FIRST + "packages.ray", "2.59.0", "fail", "ray 2.59.0 on 10.0.0.1; 2.60.0 on"),
    ("versions", FIRST + "packages.torch", "1.1", "fail", "torch 1.0 on 10.0.0.2; 1.1 on 10.0.0.1"),
    ("versions", FIRST + "packages.picows", "", "fail", "picows is not installed on 10.0.0.1"),
    ("code", FIRST + "code.datamix", "", "fail", "datamix cannot be imported on 10.0.0.1"),
    ("code", FIRST + "code.deployments", "d", "fail", "deployments is bbbbbbbbbbbb on 10.0.0.2"),
    (
        "bundles",
        FIRST + f"bundles.{BUNDLE}.error",
        "No such file or directory",
        "fail",
        "on 10.0.0.1: No such file",
    ),
    ("bundles", FIRST + f"bundles.{BUNDLE}.digest", "d", "fail", "cccccccccccc on 10.0.0.2; d on"),
    ("clocks", "nodes.0.clock_s", -2.5, "warn", "10.0.0.1 is off by 2.5 s"),
    ("clocks", "nodes.0.clock_s", 400.0, "fail", "off by 400.0 s"),
    ("GPU drivers", FIRST + "gpu_driver", "", "fail", "GPUs on 10.0.0.1"),
    ("ports", FIRST + "listeners.8000", "nginx", "fail", "nginx listens at 8000 on 10.0.0.1"),
    ("ports", FIRST + "listeners.8000", "another user", "fail", "another user listens"),
    ("disk", FIRST + "disk.free", 500 << 20, "fail", "0.5 GiB free under /tmp/ray"),
    ("disk", FIRST + "disk.free", 4 << 30, "warn", "4.0 GiB free"),
    ("shared memory", FIRST + "shared_memory.total", 64 << 20, "warn", "64 MiB on 10.0.0.1"),
    ("streams per replica", DEPLOYED + "max_ongoing_requests", 5, "fail", "5 streams"),
    ("streams per replica", DEPLOYED + "max_ongoing_requests", 100, "warn", "200 streams in, of"),
    ("health checks", DEPLOYED + "health_check_period_s", 10.0, "warn", "every 10 s"),
    ("autoscaling", DEPLOYED + "policy", "default", "warn", "a stream is a request"),
    ("autoscaling", DEPLOYED + "delays_s", [30.0, 600.0], "warn", "by 30 s and 600 s"),
    ("HTTP host", "serve.host", "127.0.0.1", "fail", "listens on 127.0.0.1"),
    (
        "draining",
        FIRST + "environment.RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
        "0.5",
        "warn",
        "is 0.5 on 10.0.0.1",
    ),
    ("device's code", FIRST + "edge", "/home/ray/edge/__init__.py", "warn", "/home/ray/edge"),
    (
        "device's weights",
        FIRST + f"bundles.{BUNDLE}.device_files",
        ["device.safetensors"],
        "warn",
        "device.safetensors on 10.0.0.1",
    ),
]


@pytest.mark.parametrize(("name", "path", "value", "status", "found"), CASES)
def test_a_trap_fires(name: str, path: str, value: Any, status: str, found: str) -> None:
    check = judged(changed(path, value))[name]
    assert check.status == status
    assert found in check.found
    assert check.fix


def test_every_trap_fires_somewhere() -> None:
    others = {"nodes", "token mode"}  # below: they take more than one change
    assert {name for name, *_ in CASES} | others == {trap.name for trap in doctor_cluster.TRAPS}


def test_a_node_that_does_not_answer_is_a_finding() -> None:
    silent = changed("nodes.1.facts", None)
    silent["nodes"][1]["error"] = "no answer in 30 s"
    check = judged(silent)["nodes"]
    assert (check.status, check.found) == ("fail", "10.0.0.2: no answer in 30 s")
    # What it does not say, nothing else may trip over.
    assert {c.name for c in doctor_cluster.judge(silent) if c.status == "fail"} == {"nodes"}


def test_a_node_that_has_left_is_none() -> None:
    gone = changed("nodes.1.alive", False)
    gone["nodes"][1]["facts"] = None
    gone["nodes"][1]["front_door"] = False
    check = judged(gone)["nodes"]
    assert (check.status, check.found) == ("ok", "1 answer, 1 have left")


def test_no_node_at_all_trips_over_nothing() -> None:
    empty: Any = healthy() | {"nodes": []}
    assert judged(empty)["HAProxy in front"].status == "fail"


@pytest.mark.parametrize(
    ("modes", "files", "status", "found"),
    [
        (["disabled", "disabled"], [True, True], "ok", "disabled"),
        ([None, None], [False, False], "ok", "disabled"),
        ([None, None], [True, True], "warn", "RAY_AUTH_MODE is not set on 10.0.0.1, 10.0.0.2"),
        ([None, None], [True, False], "fail", "disabled on 10.0.0.2; token on 10.0.0.1"),
        (["token", "disabled"], [True, True], "fail", "disabled on 10.0.0.2; token on 10.0.0.1"),
    ],
)
def test_token_mode(modes: list[str | None], files: list[bool], status: str, found: str) -> None:
    facts: Any = healthy()
    for node, mode, file in zip(facts["nodes"], modes, files, strict=True):
        node["facts"]["token_file"] = file
        del node["facts"]["environment"]["RAY_AUTH_MODE"]
        if mode is not None:
            node["facts"]["environment"]["RAY_AUTH_MODE"] = mode
    check = judged(facts)["token mode"]
    assert check.status == status and found in check.found


def test_variables_that_came_too_late_are_called_so() -> None:
    facts = changed(FIRST + "environment.RAY_SERVE_ENABLE_HA_PROXY", "0")
    facts["shell"] = dict(BOTH)
    assert "though it is 1 in this shell" in judged(facts)["HAProxy variables"].found


def test_a_head_without_processors_needs_no_bundle_but_the_policy() -> None:
    facts = changed("nodes.0.resources", {"CPU": 0.0})
    head: Any = facts["nodes"][0]["facts"]
    head["bundles"][BUNDLE] = {"digest": "", "error": "No such file", "device_files": []}
    assert judged(facts)["bundles"].status == "ok"
    head["code"]["deployments"] = ""
    assert judged(facts)["code"].status == "fail"
    head["actors"] = []
    assert judged(facts)["code"].status == "ok"


def test_a_clock_is_not_blamed_for_what_was_not_measured() -> None:
    facts = changed("nodes.0.clock_s", 2.0)
    facts["nodes"][0]["clock_error_s"] = 1.5
    assert judged(facts)["clocks"].status == "ok"


def test_long_lists_are_cut() -> None:
    assert doctor_checks.named("abcde") == "a, b, c and 2 more"


def test_the_documentation_shows_this_table() -> None:
    assert doctor_cluster.table() in (ROOT / "docs/doctor.md").read_text()


# ------------------------------------------------------------------ what is asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 0}, "devices is 0"),
        ({"timeout_s": 0.0}, "timeout is 0 s"),
        ({"address": "ws://head:1"}, "address is 'ws://head:1'"),
    ],
)
def test_wrong_questions(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        doctor_cluster.diagnose(**({"address": "auto"} | arguments))


def test_serve_details_are_read() -> None:
    served = doctor_facts.read_serve(
        {
            "http_options": {"host": "0.0.0.0", "port": 81},
            "proxies": {"n": {"status": "HEALTHY"}},
            "applications": {
                "a": {
                    "name": "a",
                    "status": "RUNNING",
                    "deployed_app_config": {"args": {"bundle": ["b", "c"]}},
                    "deployments": {
                        "D": {
                            "name": "D",
                            "status": "HEALTHY",
                            "deployment_config": {
                                "autoscaling_config": {"upscale_delay_s": 30.0, "policy": {}}
                            },
                            "required_resources": {"CPU": 1, "memory": None},
                            "replicas": [{}],
                        }
                    },
                }
            },
        }
    )
    (application,) = served["applications"]
    (deployment,) = application["deployments"]
    assert (served["port"], served["proxies"]) == (81, {"n": "HEALTHY"})
    assert application["bundles"] == ["b", "c"]
    # What is not said has Ray's defaults.
    assert deployment["max_ongoing_requests"] == 5
    assert deployment["health_check_period_s"] == 10
    assert (deployment["policy"], deployment["delays_s"]) == ("default", [30.0])
    assert (deployment["replicas"], deployment["resources"]) == (1, {"CPU": 1.0})


def test_what_is_shipped_falls_into_no_trap() -> None:
    """serve.yaml as Serve's controller tells of it, through Serve's own models."""
    from ray.serve.schema import DeploymentSchema, ServeDeploySchema

    text = (ROOT / "deployments/serve.yaml").read_text()
    whole = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = whole.applications
    (deployment,) = application.deployments
    applied = DeploymentSchema.model_validate(deployment.model_dump(exclude_unset=True))
    details = {
        "http_options": whole.http_options.model_dump(),
        "proxies": {"1": {"status": "HEALTHY"}},
        "applications": {
            "datamix": {
                "name": "datamix",
                "status": "RUNNING",
                "deployed_app_config": application.model_dump(exclude_unset=True),
                "deployments": {
                    "Backbone": {
                        "name": "Backbone",
                        "status": "HEALTHY",
                        "deployment_config": applied.model_dump(exclude_unset=True),
                        "required_resources": {"CPU": 2, "GPU": 1},
                        "replicas": [{}],
                    }
                },
            }
        },
    }
    served = doctor_facts.read_serve(details)
    assert served["applications"][0]["bundles"] == [BUNDLE]
    facts: Any = healthy() | {"serve": served}
    wrong = [check for check in doctor_cluster.judge(facts) if check.status != "ok"]
    assert wrong == []
    (found,) = served["applications"][0]["deployments"]
    assert "PredictedWait" in found["policy"] and found["delays_s"] == [0.0, 0.0]


def test_the_answer_of_a_job() -> None:
    line = doctor_facts.MARK + json.dumps({"devices": 3})
    assert doctor_facts.read_answer(f"noise\n{line}\n")["devices"] == 3
    with pytest.raises(doctor_facts.Unreachable, match="wrote 0 answers"):
        doctor_facts.read_answer("noise\n")


def test_a_clock_lies_between_sending_and_receiving() -> None:
    assert doctor_facts.clock_offset(100.0, 105.5, 101.0) == (5.0, 0.5)


def test_nodes_that_share_an_address_are_told_apart() -> None:
    table: list[dict[str, Any]] = [
        {"NodeManagerAddress": "1.2.3.4", "NodeID": key * 8, "Alive": True} for key in "ab"
    ]
    serve: Any = {"proxies": {"a" * 8: "HEALTHY"}}
    first, second = (doctor_facts.read_node(entry, table, serve) for entry in table)
    assert (first["name"], first["front_door"]) == ("1.2.3.4 (aaaaaa)", True)
    assert (second["name"], second["front_door"]) == ("1.2.3.4 (bbbbbb)", False)


# ------------------------------------------------------------------ on a node


def test_only_the_variables_that_matter_are_told() -> None:
    told = doctor_node.shown({"RAY_SERVE_X": "1", "AWS_SECRET_ACCESS_KEY": "s", "PATH": "/bin"})
    assert told == {"RAY_SERVE_X": "1"}


def test_settings_of_haproxy() -> None:
    text = "global\n    maxconn 4096\n    nbthread 4\nfrontend x\n    maxconn 9\n"
    assert doctor_node.setting("maxconn", text) == 4096
    assert doctor_node.setting("nbthread", text) == 4
    assert doctor_node.setting("other", text) == 0


def test_the_session_folder_is_the_raylets() -> None:
    assert doctor_node.session_folder(["raylet", "--session_dir=/tmp/ray/s"]) == "/tmp/ray/s"
    assert doctor_node.session_folder(["raylet"]) is None


def test_a_gpu_driver(tmp_path: Path) -> None:
    assert doctor_node.gpu_driver(tmp_path) == ""
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\n"
    (tmp_path / "proc/driver/nvidia/version").write_text(text)
    assert doctor_node.gpu_driver(tmp_path) == "570.86.15"


def test_local_ports(tmp_path: Path) -> None:
    assert doctor_node.local_ports(tmp_path) == 0
    folder = tmp_path / "proc/sys/net/ipv4"
    folder.mkdir(parents=True)
    (folder / "ip_local_port_range").write_text("32768\t60999\n")
    assert doctor_node.local_ports(tmp_path) == 28232


def test_a_token_file(tmp_path: Path) -> None:
    assert not doctor_node.token_file({"HOME": str(tmp_path)})
    assert doctor_node.token_file({"HOME": str(tmp_path), "RAY_AUTH_TOKEN": "t"})
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("t")
    assert doctor_node.token_file({"HOME": str(tmp_path)})
    elsewhere = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    assert not doctor_node.token_file(elsewhere)


def test_code_is_told_apart_by_its_content(tmp_path: Path) -> None:
    package = tmp_path / "datamix"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    before = doctor_node.digest_code(str(package / "__init__.py"))
    assert len(before) == 12 and doctor_node.digest_code("") == ""
    (package / "b.py").write_text("b = 1\n")
    assert doctor_node.digest_code(str(package)) != before


def test_code_is_looked_for_where_replicas_look(tmp_path: Path) -> None:
    for package in ("datamix", "edge"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    found = doctor_node.find_code(dict(os.environ) | {"PYTHONPATH": str(tmp_path)})
    assert found["datamix"] == str(tmp_path / "datamix/__init__.py")
    assert found["edge"] == str(tmp_path / "edge/__init__.py")


def test_a_bundle_as_a_node_sees_it(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    assert "No such file" in doctor_node.see_bundle("b", str(tmp_path))["error"]
    bundle.mkdir()
    (bundle / "backbone.safetensors").write_bytes(b"weights")
    manifest = json.dumps(
        {"hashes": {"backbone.safetensors": hashlib.sha256(b"weights").hexdigest()}}
    )
    (bundle / "manifest.json").write_text(manifest)
    seen = doctor_node.see_bundle("b", str(tmp_path))
    assert seen["digest"] == hashlib.sha256(manifest.encode()).hexdigest()[:12]
    assert (seen["error"], seen["device_files"]) == ("", [])
    assert doctor_node.see_bundle(f"file://{bundle}", "/")["digest"] == seen["digest"]
    (bundle / "stem.onnx").touch()
    assert doctor_node.see_bundle("b", str(tmp_path))["device_files"] == ["stem.onnx"]
    (bundle / "backbone.safetensors").write_bytes(b"weightz")
    assert "hash" in doctor_node.see_bundle("b", str(tmp_path))["error"]


# ------------------------------------------------------------------ a real cluster


@pytest.mark.cluster
def test_a_real_cluster_is_examined(
    cluster: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    arguments = ["doctor", "--address", cluster.address, "--devices", "10", "--json", str(report)]
    done = run(arguments)
    body = json.loads(report.read_text())
    found = {check["name"]: check for check in body["checks"]}
    assert set(found) == {trap.name for trap in doctor_cluster.TRAPS}
    # The repository itself is what runs here, with the device's half.
    expected = {"device's code", "device's weights"}
    assert {name for name, check in found.items() if check["status"] != "ok"} == expected, found
    assert done == 0 and body["ok"]
    assert found["nodes"]["found"] == "1 answer"
    assert "HAProxy answers on 1 of 1" in found["HAProxy in front"]["found"]
    assert cluster.bundle in found["bundles"]["found"]
    assert "device's code" in capsys.readouterr().out


def run(arguments: list[str]) -> int:
    """The command in a process of its own: Ray's settings must not stay in this one."""
    environment = {name: value for name, value in os.environ.items() if name not in BOTH}
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
    )
    print(done.stdout, done.stderr)
    return done.returncode


@contextlib.contextmanager
def two_raylets(other: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    """A head with a dashboard and a second raylet that was started with ``other`` variables.

    Yields Ray's address, the dashboard's, and the process of the second raylet.
    """
    from ray.cluster_utils import Cluster as Raylets

    from cluster.local import free_port

    folder = Path(tempfile.mkdtemp(prefix="dmx-"))
    before = dict(os.environ)
    # The job's `python` is found on the path, as in an image.
    own = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    os.environ.update(BOTH | own)
    (folder / "ray").mkdir()
    port = free_port()
    head = {
        "num_cpus": 1,
        "object_store_memory": 80 << 20,
        "include_dashboard": True,
        "dashboard_port": port,
        # Its default would meet that of another cluster on this machine.
        "dashboard_agent_listen_port": free_port(),
    }
    raylets = Raylets(initialize_head=True, head_node_args=head)
    try:
        second = raylets.add_node(
            num_cpus=1,
            object_store_memory=80 << 20,
            dashboard_agent_listen_port=free_port(),
            env_vars=other,
        )
        (process,) = second.all_processes["raylet"]
        yield raylets.address, f"http://127.0.0.1:{port}", process.process.pid
    finally:
        raylets.shutdown()  # type: ignore[no-untyped-call]
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_a_node_that_differs_and_one_that_is_stuck(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "datamix", tmp_path / "datamix", ignore=lambda *_: ["__pycache__"])
    (tmp_path / "datamix/errors.py").write_text("# another release\n")
    other = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    report = tmp_path / "report.json"
    with two_raylets(other) as (address, dashboard, raylet):
        # Through the dashboard: two files travel as a job.
        asked = ["doctor", "--address", dashboard, "--timeout", "60", "--json", str(report)]
        assert run([*asked, "--bundle", str(tmp_path)]) == 1
        found = {c["name"]: c for c in json.loads(report.read_text())["checks"]}
        assert found["nodes"]["found"] == "2 answer"
        assert found["Serve"]["found"] == "it does not run on this cluster"
        assert "ENABLE_HA_PROXY was not 1" in found["HAProxy variables"]["found"]
        assert "THROUGHPUT" not in found["HAProxy variables"]["found"]
        assert found["code"]["found"].startswith("datamix is ") and " on " in found["code"]["found"]
        assert "deployments" not in found["code"]["found"]
        assert "No such file" in found["bundles"]["found"]
        assert found["versions"]["status"] == found["clocks"]["status"] == "ok"
        os.kill(raylet, signal.SIGSTOP)
        try:
            asked = ["doctor", "--address", address, "--timeout", "10", "--json", str(report)]
            assert run(asked) == 1
        finally:
            os.kill(raylet, signal.SIGCONT)
        found = {c["name"]: c for c in json.loads(report.read_text())["checks"]}
        assert found["nodes"]["status"] == "fail"
        assert "no answer in 10 s" in found["nodes"]["found"]
        assert found["code"]["status"] == "ok"  # of the one that does answer


class Dashboard:
    """A dashboard that takes a job only when it is asked for the third time."""

    def __init__(self, reason: str) -> None:
        self.asked: list[dict[str, Any]] = []
        self.reason = reason

    def submit_job(self, **job: Any) -> str:
        self.asked.append(job)
        files = Path(job["runtime_env"]["working_dir"], "cluster").iterdir()
        assert {file.name for file in files} == set(doctor_facts._FILES)
        if len(self.asked) < 3:
            raise RuntimeError(f"Request failed with status code 500: {self.reason}")
        return "job"


REQUEST: doctor_facts.Request = {
    "bundles": [],
    "packages": [],
    "devices": 1,
    "timeout_s": 30.0,
}


def test_a_cluster_that_has_just_started_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    dashboard = Dashboard("No available agent to submit job, please try again later.")
    assert doctor_facts._submit(dashboard, REQUEST) == "job"
    environment = dashboard.asked[0]["runtime_env"]
    assert json.loads(environment["env_vars"]["DATAMIX_DOCTOR"]) == REQUEST
    assert not Path(environment["working_dir"]).exists()
    other = Dashboard("no such route")
    with pytest.raises(RuntimeError, match="no such route"):
        doctor_facts._submit(other, REQUEST)
    assert len(other.asked) == 1


def test_no_dashboard_is_said_in_one_sentence() -> None:
    from cluster.local import free_port

    with pytest.raises(doctor_facts.Unreachable, match="no Ray dashboard answers at http://127"):
        doctor_facts.by_job(f"http://127.0.0.1:{free_port()}", REQUEST)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def nobody(address: str, request: doctor_facts.Request) -> Facts:
        raise doctor_facts.Unreachable(f"no Ray cluster answers at {address!r}")

    monkeypatch.setattr(doctor_facts, "facts", nobody)
    with pytest.raises(Unavailable, match="no Ray cluster answers at '10.0.0.9:6379'"):
        doctor.diagnose(address="10.0.0.9:6379")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--address", "10.0.0.9:6379"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("datamix: no Ray cluster answers")

"""The clusters' files against Ray's own schema, offline, and against traps it cannot see."""

import ast
import copy
import re
import shlex
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.local import max_streams

ROOT = Path(__file__).parents[1]
EXPORTS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
}
STARTS = ["head_start_ray_commands", "worker_start_ray_commands"]
AWS, GCP, ON_PREMISES = "cluster.yaml", "cluster/launch/gcp.yaml", "cluster/launch/onprem.yaml"
# What is done to a node, in the files as Ray prepares them.
DONE = ["head_setup_commands", "worker_setup_commands", *STARTS]


def load(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / name).read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module", params=[AWS, GCP, ON_PREMISES])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each of the files."""
    return load(request.param)


@pytest.fixture(scope="module", params=[AWS, GCP])
def cloud(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each file whose machines are bought."""
    return load(request.param)


def worker(config: dict[str, Any]) -> dict[str, Any]:
    """The workers' type; the last there is, the one that is not the head's but on premises."""
    found: dict[str, Any] = list(config["available_node_types"].values())[-1]
    return found


@pytest.fixture(scope="module")
def constraints() -> dict[str, str]:
    pins = re.findall(
        r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    return {name.lower().replace("_", "-"): release for name, release in pins}


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does before it talks to the cloud; returns the config with Ray's defaults."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def exports(commands: list[str]) -> dict[str, str]:
    """The variables exported before `ray start` in the command that holds it."""
    (start,) = [command for command in commands if "ray start" in command]
    before, _, _ = start.partition("ray start")
    words = shlex.split(before.replace(";", " ; "))
    if "export" not in words:
        return {}
    words = words[words.index("export") + 1 :]
    return dict(word.split("=", 1) for word in words[: words.index(";")])


def missing(config: dict[str, Any]) -> list[str]:
    """The start commands in which a variable of HAProxy mode does not stand."""
    return [key for key in STARTS if not EXPORTS.items() <= exports(config[key]).items()]


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = validate(config)
    assert worker(prepared)["max_workers"] == config["max_workers"]
    assert worker(prepared)["min_workers"] == 0
    assert worker(prepared)["resources"] == {"CPU": 8, "GPU": 1}
    # Nothing of Ray's default set-up (it installs a nightly) may be left in the merged config.
    assert "ray-wheels" not in str(prepared) and "anaconda" not in str(prepared)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("idle_timeout_minutes",), "ten"),
        (("no_such_setting",), 1),
        (("docker", "imagge"), "x"),
        (("head_node_type",), "none_of_them"),
        (("available_node_types", "gpu_worker", "min_workers"), 99),
        (("available_node_types", "gpu_worker", "resources", "GPU"), -1),
    ],
)
def test_ray_refuses_a_broken_one(path: tuple[str, ...], value: object) -> None:
    from jsonschema import ValidationError

    broken = load(AWS)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((ValidationError, ValueError)):
        validate(broken)


def test_both_kinds_of_node_start_in_haproxy_mode(config: dict[str, Any]) -> None:
    assert missing(config) == []
    head, other = (exports(config[key]) for key in STARTS)
    assert head == other


@pytest.mark.parametrize("key", STARTS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RAY_SERVE_ENABLE_HA_PROXY=1", "RAY_SERVE_ENABLE_HA_PROXY=0"),
        ("RAY_SERVE_THROUGHPUT_OPTIMIZED=1", ""),
        ("export ", "env "),
    ],
)
def test_a_node_without_haproxy_mode_is_found(
    config: dict[str, Any], key: str, old: str, new: str
) -> None:
    broken = copy.deepcopy(config)
    broken[key] = [command.replace(old, new) for command in broken[key]]
    assert missing(broken) == [key]


def test_the_variables_are_ones_that_this_ray_reads(config: dict[str, Any]) -> None:
    import ray.serve._private.constants as constants

    named = [n for n in exports(config[STARTS[0]]) if n.startswith("RAY_SERVE_")]
    assert len(named) == 5
    source = Path(constants.__file__).read_text()
    assert [name for name in named if f'"{name}"' not in source] == []


def test_descriptors_suffice_for_haproxy(cloud: dict[str, Any]) -> None:
    (limit,) = re.findall(r"nofile=(\d+)", " ".join(cloud["docker"]["run_options"]))
    assert int(exports(cloud[STARTS[0]])["RAY_SERVE_HAPROXY_MAXCONN"]) <= max_streams(int(limit))
    assert f"limit of {limit} open files" in (ROOT / ON_PREMISES).read_text().replace("\n# ", " ")


def test_threads_do_not_exceed_the_workers_cpus(config: dict[str, Any]) -> None:
    cpus = worker(config)["resources"]["CPU"]
    assert int(exports(config[STARTS[1]])["RAY_SERVE_HAPROXY_NBTHREAD"]) <= cpus


def test_image_and_packages_are_pinned(config: dict[str, Any], constraints: dict[str, str]) -> None:
    import ray

    if config["docker"]:
        assert config["docker"]["image"] == f"rayproject/ray:{constraints['ray']}-py311-gpu"
    assert ray.__version__ == constraints["ray"]
    assert "by pip-compile with Python 3.11" in (ROOT / "constraints.txt").read_text()
    (install,) = config["setup_commands"]
    words = shlex.split(install)
    assert words[words.index("-c") + 1] in config["file_mounts"]
    packages = [w.partition("[")[0] for w in words[words.index("-c") + 2 :]]
    assert "torch" in packages and [p for p in packages if p not in constraints] == []
    # Nothing of Ray's own, which pins nothing.
    prepared = validate(config)
    assert all(prepared[key] == [install] for key in DONE[:2])


def test_machines_start_from_a_named_image() -> None:
    """A name that stays, not a family or "latest"."""
    for kind in load(AWS)["available_node_types"].values():
        assert re.fullmatch(r"ami-[0-9a-f]{17}", kind["node_config"]["ImageId"])
    for kind in load(GCP)["available_node_types"].values():
        (disk,) = kind["node_config"]["disks"]
        assert re.search(r"/images/[\w-]+-v\d{8}$", disk["initializeParams"]["sourceImage"])


@pytest.mark.parametrize("name", [GCP, ON_PREMISES])
def test_what_is_done_to_a_node_is_the_same_everywhere(name: str) -> None:
    first, other = validate(load(AWS)), validate(load(name))
    for key in (*DONE, "file_mounts", "rsync_exclude"):
        assert other[key] == first[key], key


def test_cpu_nodes_serve_the_same_application() -> None:
    gpu, cpu = (load(f"deployments/serve{end}.yaml") for end in ("", "-cpu"))
    arguments = gpu["applications"][0]["args"]
    arguments |= {"device": "cpu", "dtype": "float32"}
    del arguments["channels_last"]
    del gpu["applications"][0]["deployments"][0]["ray_actor_options"]["num_gpus"]
    assert gpu == cpu


def test_a_worker_has_room_for_a_replica(config: dict[str, Any]) -> None:
    for name in ("deployments/serve.yaml", "deployments/serve-cpu.yaml"):
        wanted = load(name)["applications"][0]["deployments"][0]["ray_actor_options"]
        has = worker(config)["resources"]
        assert wanted["num_cpus"] <= has["CPU"] and wanted.get("num_gpus", 0) <= has["GPU"]


def test_serve_makes_a_config_of_the_files_arguments() -> None:
    """What `serve deploy` calls with a file's arguments; it hands a dict to a builder it does not
    understand."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build

    import deployments.app

    builder: Any = deployments.app.app
    arguments = load("deployments/serve-cpu.yaml")["applications"][0]["args"]
    arguments["bundle"] = str(ROOT / arguments["bundle"])
    assert type(build(builder, arguments)).__name__ == "Application"


def test_only_what_is_needed_is_open_to_others() -> None:
    (rule,) = load(AWS)["provider"]["security_group"]["IpPermissions"]
    port = load("deployments/serve.yaml")["http_options"]["port"]
    assert (rule["FromPort"], rule["ToPort"]) == (port, port)
    assert "0.0.0.0/0" not in str(rule)


def test_the_first_autoscaler_runs(config: dict[str, Any]) -> None:
    """The second takes a head of provider local for gone; one for all, so that tests try it."""
    for key in STARTS:
        assert exports(config[key])["RAY_enable_autoscaler_v2"] == "0"


def test_no_haproxy_outlives_its_ray(config: dict[str, Any]) -> None:
    from cluster.launcher import STOP

    for key in STARTS:
        assert config[key][0] == STOP


def test_what_the_cloud_imports_is_installed(config: dict[str, Any]) -> None:
    (install,) = config["setup_commands"]
    words = shlex.split(install)
    installed = {w.partition("[")[0] for w in words[words.index("-c") + 2 :]}
    imported = set()
    for path in (*(ROOT / "datamix").glob("*.py"), *(ROOT / "deployments").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"datamix", "deployments"}
    packages = {packages_distributions()[name][0].lower().replace("_", "-") for name in foreign}
    assert packages - installed == {"uvicorn"}  # which ray[serve] brings


def test_the_pins_fit_pyproject(constraints: dict[str, str]) -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    # An extra may name another extra of ours.
    parsed = [r for line in wanted if (r := Requirement(line)).name != project["name"]]
    unfit = [str(r) for r in parsed if constraints[r.name.lower()] not in r.specifier]
    assert unfit == []


def test_the_cloud_gets_neither_device_code_nor_device_weights(config: dict[str, Any]) -> None:
    sources = set(config["file_mounts"].values())
    assert sources == {"./datamix", "./deployments", "./bundles", "./constraints.txt"}
    assert all((ROOT / source).exists() for source in sources)
    assert {"device.safetensors", "*.onnx"} <= set(config["rsync_exclude"])


def test_the_dashboard_listens_on_loopback_only(config: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in config[STARTS[0]][-1]


def test_serve_yaml_finds_its_bundle_on_the_nodes(config: dict[str, Any]) -> None:
    served = yaml.safe_load((ROOT / "deployments/serve.yaml").read_text())
    bundle = Path(served["applications"][0]["args"]["bundle"])
    assert bundle.parts[0] == "bundles" and not bundle.is_absolute()
    for key in STARTS:
        (folder,) = re.findall(r"^cd (\S+);", config[key][-1])
        assert f"{folder}/bundles" in config["file_mounts"]
        assert exports(config[key])["PYTHONPATH"] == folder.replace("~", "$HOME")

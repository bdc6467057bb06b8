"""The RayService and the Containerfile against cluster.yaml, serve.yaml and Kubernetes' schemas.

What is checked of the manifest, as no Kubernetes runs here:

- the pods' templates and the NetworkPolicy, strictly, against the schemas of Kubernetes that the
  package kubernetes-validate ships;
- the fields around them against RAY_SERVICE below: names and types of those fields of KubeRay's API
  ``ray.io/v1`` that are used, written down from its documentation. It is not the whole of KubeRay's
  own definition, whose rules in CEL are not here;
- ``serveConfigV2`` against Ray Serve's own model.
"""

import copy
import fnmatch
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster import manifest
from cluster.local import max_streams

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "cluster/kubernetes"
# The oldest and the newest release that this is for.
KUBERNETES = ("1.29.0", "1.36.0")


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
OBJECT = {"type": "object"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
TEMPLATE = fields(("spec",), metadata=OBJECT, spec=OBJECT)
RAY_SERVICE = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=fields(("name",), name=TEXT, annotations=TEXTS, labels=TEXTS),
    spec=fields(
        ("serveConfigV2", "rayClusterConfig"),
        serveConfigV2=TEXT,
        excludeHeadPodFromServeSvc=FLAG,
        rayClusterConfig=fields(
            ("rayVersion", "headGroupSpec"),
            rayVersion=TEXT,
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=fields(
                version={"enum": ["v1", "v2"]},
                idleTimeoutSeconds=NUMBER,
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            ),
            gcsFaultToleranceOptions=fields(
                ("redisAddress",),
                redisAddress=TEXT,
                redisPassword=fields(
                    valueFrom=fields(secretKeyRef=fields(("name", "key"), name=TEXT, key=TEXT))
                ),
                externalStorageNamespace=TEXT,
            ),
            headGroupSpec=fields(
                ("rayStartParams", "template"), rayStartParams=TEXTS, template=TEMPLATE
            ),
            workerGroupSpecs={
                "type": "array",
                "items": fields(
                    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
                    groupName=TEXT,
                    replicas=NUMBER,
                    minReplicas=NUMBER,
                    maxReplicas=NUMBER,
                    rayStartParams=TEXTS,
                    template=TEMPLATE,
                ),
            },
        ),
    ),
)


@pytest.fixture(scope="module")
def cluster_yaml() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text()))


@pytest.fixture(scope="module")
def service(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (document for document in documents if document["kind"] == "RayService")
    return found


@pytest.fixture(scope="module")
def policy(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (document for document in documents if document["kind"] == "NetworkPolicy")
    return found


def groups(service: dict[str, Any]) -> list[dict[str, Any]]:
    """The head's group, then the workers'."""
    config = service["spec"]["rayClusterConfig"]
    return [config["headGroupSpec"], *config["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def pod(group: dict[str, Any]) -> dict[str, Any]:
    """A group's template as a pod of its own, which the schemas know."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "ray"},
        "spec": group["template"]["spec"],
    }


def environment(group: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(group)["env"]}


# ------------------------------------------------------------------ one source


AGAIN = "run `python -m cluster.manifest --write`"


def test_the_files_are_what_the_two_sources_make(cluster_yaml: dict[str, Any]) -> None:
    made = manifest.build(cluster_yaml, (ROOT / "deployments/serve.yaml").read_text())
    assert (FOLDER / "rayservice.yaml").read_text() == made, AGAIN
    assert (FOLDER / "Containerfile").read_text() == manifest.containerfile(cluster_yaml), AGAIN


def test_what_changes_there_changes_here(cluster_yaml: dict[str, Any]) -> None:
    other = copy.deepcopy(cluster_yaml)
    (kind,) = (k for k in other["available_node_types"].values() if k["resources"].get("GPU"))
    kind["max_workers"] = 3
    other["idle_timeout_minutes"] = 1
    other["docker"]["run_options"] = ["--ulimit nofile=1000:1000"]
    other["worker_start_ray_commands"] = [
        "cd ~/datamix; export RAY_SERVE_X=9 PYTHONPATH=$HOME/datamix; "
        "ray start --object-store-memory=1000 --address=$RAY_HEAD_IP:6379"
    ]
    serve = "http_options: {port: 81}\napplications:\n- deployments: [{name: B}]\n"
    service, policy = yaml.safe_load_all(manifest.build(other, serve))
    head, worker = groups(service)
    assert worker["maxReplicas"] == 3
    assert service["spec"]["rayClusterConfig"]["autoscalerOptions"]["idleTimeoutSeconds"] == 60
    assert "ulimit -n 1000 " in container(head)["args"][0]
    expected = {"RAY_SERVE_X": "9", "PYTHONPATH": "/home/ray/datamix"}
    assert environment(head) == environment(worker) == expected
    for group in (head, worker):
        assert group["rayStartParams"]["object-store-memory"] == "1000"
    assert container(worker)["readinessProbe"]["httpGet"]["port"] == 81
    assert policy["spec"]["ingress"][0] == {"ports": [{"port": 81}]}
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == yaml.safe_load(serve)


def test_an_image_of_ones_own(cluster_yaml: dict[str, Any]) -> None:
    made = manifest.build(cluster_yaml, (ROOT / "deployments/serve.yaml").read_text(), "r.x/y:1")
    service, _ = yaml.safe_load_all(made)
    assert {container(group)["image"] for group in groups(service)} == {"r.x/y:1"}


def test_a_start_command_must_be_there() -> None:
    with pytest.raises(ValueError, match="0 commands start Ray, expected 1"):
        manifest.read_start(["ray stop"])


# ------------------------------------------------------------------ schemas


def test_kuberay_would_take_the_fields(service: dict[str, Any]) -> None:
    jsonschema.validate(service, RAY_SERVICE)


@pytest.mark.parametrize("release", KUBERNETES)
def test_kubernetes_takes_the_pods_and_the_policy(
    service: dict[str, Any], policy: dict[str, Any], release: str
) -> None:
    for document in (*map(pod, groups(service)), policy):
        kubernetes_validate.validate(document, release, strict=True)


def broken(whole: Any, path: str, value: Any) -> Any:
    whole = copy.deepcopy(whole)
    place = whole
    *way, last = path.split(".")
    for key in way:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.rayClusterConfg", {}),
        ("spec.serveConfigV2", {}),
        ("spec.rayClusterConfig.autoscalerOptions.upscalingMode", "Slow"),
        ("spec.rayClusterConfig.gcsFaultToleranceOptions.redisAdress", "redis:6379"),
        ("spec.rayClusterConfig.workerGroupSpecs.0.maxReplicas", "8"),
        ("spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus", 0),
    ],
)
def test_a_broken_service_is_found(service: dict[str, Any], path: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken(service, path, value), RAY_SERVICE)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.containers.0.readinessProbe.httpGet.pathh", "/"),
        ("spec.containers.0.env.0.value", 1),
        ("spec.terminationGracePeriodSeconds", "long"),
        ("spec.containers.0.resources.limits", []),
    ],
)
def test_a_broken_pod_is_found(service: dict[str, Any], path: str, value: Any) -> None:
    worker = pod(groups(service)[1])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken(worker, path, value), KUBERNETES[-1], strict=True)


def test_serve_takes_its_config(service: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert served == yaml.safe_load((ROOT / "deployments/serve.yaml").read_text())
    ServeDeploySchema.model_validate(served)


# ------------------------------------------------------------------ the same settings, read anew


def test_images_versions_and_variables(
    service: dict[str, Any], cluster_yaml: dict[str, Any]
) -> None:
    import ray

    assert service["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
    assert f":{ray.__version__}-" in cluster_yaml["docker"]["image"]
    head, worker = groups(service)
    assert container(head)["image"] == container(worker)["image"]
    for group, key in ((head, "head_start_ray_commands"), (worker, "worker_start_ray_commands")):
        command = " ".join(cluster_yaml[key])
        exported = dict(re.findall(r"(RAY_\w+)=(\S+?);?(?=\s)", command))
        told = {k: v for k, v in environment(group).items() if k.startswith("RAY_")}
        other = {"RAY_HEAD_IP", "RAY_enable_autoscaler_v2"}  # machines have another autoscaler
        assert told == {k: v for k, v in exported.items() if k not in other}
        assert len(told) >= 5


def test_resources_and_limits(service: dict[str, Any], cluster_yaml: dict[str, Any]) -> None:
    head, worker = groups(service)
    kinds = cluster_yaml["available_node_types"]
    (kind,) = (k for k in kinds.values() if k["resources"].get("GPU"))
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert int(worker["rayStartParams"]["num-cpus"]) == kind["resources"]["CPU"]
    gpus = str(kind["resources"]["GPU"])
    assert worker["rayStartParams"]["num-gpus"] == gpus
    assert container(worker)["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert (worker["minReplicas"], worker["maxReplicas"]) == (
        kind["min_workers"],
        kind["max_workers"],
    )
    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    (deployment,) = served["applications"][0]["deployments"]
    assert deployment["autoscaling_config"]["max_replicas"] <= worker["maxReplicas"]
    assert service["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"] is True


def test_haproxy_gets_its_descriptors(service: dict[str, Any]) -> None:
    assert service["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    for group in groups(service):
        (line,) = container(group)["args"]
        (limit,) = re.findall(r"ulimit -n (\d+) && ", line)
        most = int(environment(group)["RAY_SERVE_HAPROXY_MAXCONN"])
        assert most <= max_streams(int(limit))
        assert line.endswith("&& $KUBERAY_GEN_RAY_START_CMD")
        # What KubeRay would set by itself does not suffice; else this could go.
        assert most > max_streams(65536)


def test_pods_end_slowly_enough_and_are_ready_when_haproxy_is(service: dict[str, Any]) -> None:
    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    (deployment,) = served["applications"][0]["deployments"]
    for group in groups(service):
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace > deployment["graceful_shutdown_timeout_s"]
    head, worker = groups(service)
    probe = container(worker)["readinessProbe"]["httpGet"]
    assert probe == {"path": "/-/healthz", "port": served["http_options"]["port"]}
    assert "readinessProbe" not in container(head)  # KubeRay's own: Serve is deployed after it


def test_strangers_reach_the_front_door_only(
    service: dict[str, Any], policy: dict[str, Any]
) -> None:
    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    from_anywhere = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert from_anywhere == [{"ports": [{"port": served["http_options"]["port"]}]}]


# ------------------------------------------------------------------ the image


def lines(path: Path) -> list[str]:
    """A Containerfile's instructions, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", path.read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_is_set_up_as_nodes_are(cluster_yaml: dict[str, Any]) -> None:
    instructions = lines(FOLDER / "Containerfile")
    assert instructions[0] == f"FROM {cluster_yaml['docker']['image']}"
    (install,) = (line for line in instructions if "pip install" in line)
    (setup,) = cluster_yaml["setup_commands"]

    def packages(command: str) -> set[str]:
        words = shlex.split(command)
        return set(words[words.index("-c") + 2 :])

    assert packages(install) == packages(setup)
    sources = {line.split()[-2] for line in instructions if line.startswith("COPY")}
    assert sources == {Path(source).name for source in cluster_yaml["file_mounts"].values()}
    assert f"WORKDIR {manifest.FOLDER}" in instructions
    assert f"ENV PYTHONPATH={manifest.FOLDER}" in instructions


def let_in(path: str, patterns: list[str]) -> bool:
    """Whether a file gets into the build: the last pattern that matches it or a folder counts."""
    kept = True
    parts = path.split("/")
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        if bare.startswith("**/"):
            matches = any(fnmatch.fnmatchcase(part, bare[3:]) for part in parts)
        else:
            matches = fnmatch.fnmatchcase(parts[0], bare)
        if matches:
            kept = pattern.startswith("!")
    return kept


def test_neither_device_code_nor_device_weights_get_into_the_build() -> None:
    patterns = lines(FOLDER / "Containerfile.dockerignore")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {path for path in done.stdout.splitlines() if let_in(path, patterns)}
    assert {path.split("/")[0] for path in files} == {
        "bundles",
        "constraints.txt",
        "datamix",
        "deployments",
    }
    assert not any(path.endswith(("device.safetensors", ".onnx")) for path in files)
    assert "bundles/fashion-mnist-mix/backbone.safetensors" in files
    assert "deployments/serve.yaml" in files
    (check,) = (line for line in lines(FOLDER / "Containerfile") if "find_spec" in line)
    assert "test ! -e edge" in check and "device.safetensors" in check

"""The files of cluster/kubernetes, made of `cluster.yaml` and `deployments/serve.yaml`.

``python -m cluster.manifest`` prints the RayService, ``--write`` writes it and the Containerfile; a
test compares the files with what they would be, so that a setting has one home. What is here and
not there is Kubernetes' own.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import textwrap
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).parent / "kubernetes"
FOLDER = "/home/ray/datamix"
# Left to the system and to Kubernetes' own processes on a node of that size.
SPARE_CPUS = 1
# Replicas and HAProxy are told to go, and devices connect elsewhere, before a pod is killed.
GRACE_MARGIN_S = 60

_TEMPLATE = """\
# DataMix on Kubernetes by KubeRay 1.5 or newer: a head, and GPU workers that come and go.
#
# Made by `python -m cluster.manifest --write` of cluster.yaml and deployments/serve.yaml.
# docs/kubernetes.md tells what must be there before, and what nobody has tried yet.
apiVersion: ray.io/v1
kind: RayService
metadata:
  name: datamix
  annotations:
    # Else KubeRay starts Ray under `ulimit -n 65536`, with which HAProxy refuses to start: it needs
    # two and a half descriptors for each connection that it may have.
    ray.io/overwrite-container-cmd: "true"
spec:
  # The head keeps to Ray's own services: devices connect to the workers.
  excludeHeadPodFromServeSvc: true
  serveConfigV2: |
{serve}
  rayClusterConfig:
    rayVersion: {ray}
    enableInTreeAutoscaling: true
    autoscalerOptions:
      version: v2
      idleTimeoutSeconds: {idle_s}
      # At most as many pods may be starting as there are, as upscaling_speed 1 says elsewhere.
      upscalingMode: Conservative
    # With a Redis, workers and their streams outlive a head that dies, and Serve's controller
    # finds its applications again. Without this block a head that dies takes all streams with it.
    gcsFaultToleranceOptions:
      redisAddress: redis:6379
      redisPassword:
        valueFrom:
          secretKeyRef: {{name: datamix-redis, key: password}}
    headGroupSpec:
      rayStartParams:
        # No replica runs here, so that load cannot starve Ray's own services.
        num-cpus: "0"
        # The operator deploys through the dashboard; the NetworkPolicy below keeps others out.
        dashboard-host: 0.0.0.0{store}
      template:
        spec:
          terminationGracePeriodSeconds: {grace_s}
          containers:
            - name: ray-head
              image: &image {image}
              command: &command ["/bin/bash", "-lc", "--"]
              args: &args
                - >-
                  cd {folder} && ulimit -n {descriptors} && $KUBERAY_GEN_RAY_START_CMD
              env: &environment
{environment}
              resources:
                requests: {{cpu: "4", memory: 16Gi, ephemeral-storage: 40Gi}}
                limits: {{memory: 16Gi, ephemeral-storage: 40Gi}}
              ports:
                - {{name: gcs-server, containerPort: 6379}}
                - {{name: dashboard, containerPort: 8265}}
                - {{name: serve, containerPort: {port}}}
    workerGroupSpecs:
      - groupName: gpu-worker
        # Ray's autoscaler decides between these.
        replicas: {least}
        minReplicas: {least}
        maxReplicas: {most}
        rayStartParams:
          num-cpus: "{cpus}"
          num-gpus: "{gpus}"{store_worker}
        template:
          spec:
            terminationGracePeriodSeconds: {grace_s}
            tolerations:
              - {{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}}
            containers:
              - name: ray-worker
                image: *image
                command: *command
                args: *args
                env: *environment
                # Of what cluster.yaml's {machine} has, {spare} processor is the system's. No limit
                # on processors, which would throttle HAProxy and the replica's event loop.
                resources:
                  requests: {{cpu: "{requested}", memory: 24Gi, ephemeral-storage: 40Gi}}
                  limits: {{memory: 24Gi, ephemeral-storage: 40Gi, nvidia.com/gpu: "{gpus}"}}
                ports:
                  - {{name: serve, containerPort: {port}}}
                # HAProxy answers 200 while it knows a replica that is up. A worker that has neither
                # yet gets no devices; a replica that dies is HAProxy's business, not the probe's.
                readinessProbe:
                  httpGet: {{path: /-/healthz, port: {port}}}
                  periodSeconds: 2
                  timeoutSeconds: 2
                  failureThreshold: 3
---
# Who reaches Ray's ports owns the cluster ({auth}): only its own pods and the
# operator do. Port {port} is open to the load balancer that ends TLS in front (docs/security.md).
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: datamix
spec:
  podSelector:
    matchLabels: &ours {{ray.io/is-ray-node: "yes", app.kubernetes.io/created-by: kuberay-operator}}
  policyTypes: [Ingress]
  ingress:
    - ports: [{{port: {port}}}]
    - from: [{{podSelector: {{matchLabels: *ours}}}}]
    - from:
        - namespaceSelector: {{}}
          podSelector: {{matchLabels: {{app.kubernetes.io/name: kuberay-operator}}}}
      ports: [{{port: 8265}}, {{port: {port}}}]
    # Prometheus, to the port that KubeRay names metrics; the dashboard's would be one too many.
    - from:
        - namespaceSelector: {{}}
          podSelector: {{matchLabels: {{app.kubernetes.io/name: prometheus}}}}
      ports: [{{port: 8080}}]
"""


_CONTAINERFILE = """\
# The cloud's half of DataMix on Ray's own image, as cluster.yaml sets up its nodes. Made by
# `python -m cluster.manifest --write` of cluster.yaml: change that.
#   docker build -f cluster/kubernetes/Containerfile -t registry.example.com/datamix:0.1.0 .
# Containerfile.dockerignore lets in what is copied here and nothing else (for podman:
# --ignorefile cluster/kubernetes/Containerfile.dockerignore).
FROM {image}

WORKDIR {folder}
COPY --chown=ray:users constraints.txt ./
# pip's constraints pin every release, Ray's included: it must be the one that the image brought.
RUN pip install --no-cache-dir --no-input -c constraints.txt \\
{packages}

COPY --chown=ray:users datamix ./datamix
COPY --chown=ray:users deployments ./deployments
COPY --chown=ray:users bundles ./bundles
ENV PYTHONPATH={folder}

# The device's code and weights handle the secrets: an image with them is not to be.
RUN test ! -e edge && test -z "$(find . -name device.safetensors -o -name '*.onnx')" \\
    && python -c "import deployments.app, importlib.util as u; assert not u.find_spec('edge')"
"""


@dataclass(frozen=True, slots=True)
class Start:
    """How a node starts Ray: the variables exported before, and the options of ``ray start``."""

    environment: dict[str, str]
    options: dict[str, str]


def read_start(commands: list[str]) -> Start:
    """Read the start commands of a kind of node in cluster.yaml.

    Raises:
        ValueError: not exactly one of them starts Ray.
    """
    starting = [command for command in commands if "ray start" in command]
    if len(starting) != 1:
        raise ValueError(f"{len(starting)} commands start Ray, expected 1")
    before, _, after = starting[0].partition("ray start")
    words = shlex.split(before.replace(";", " ; "))
    exported = words[words.index("export") + 1 :] if "export" in words else []
    pairs = [word.split("=", 1) for word in exported if "=" in word]
    options = [word.removeprefix("--").split("=", 1) for word in shlex.split(after) if "=" in word]
    return Start(
        {name: _absolute(value) for name, value in pairs}, {key: value for key, value in options}
    )


def _absolute(value: str) -> str:
    """A path without the home folder's short names, which a container's `env` would not expand."""
    return re.sub(r"^(~|\$HOME)(?=/|$)", "/home/ray", value)


def build(cluster: dict[str, Any], serve: str, image: str | None = None) -> str:
    """The manifest.

    Args:
        cluster: cluster.yaml.
        serve: serve.yaml, as text: its comments come along.
        image: the pods' image; None for a name that stands for one.
    """
    (worker,) = (
        kind
        for kind in cluster["available_node_types"].values()
        if kind["resources"].get("GPU", 0) > 0
    )
    start = read_start(cluster["worker_start_ray_commands"])
    served = yaml.safe_load(serve)
    stop_s = max(
        deployment.get("graceful_shutdown_timeout_s", 20)
        for application in served["applications"]
        for deployment in application["deployments"]
    )
    (ray,) = re.findall(r"^\S+:([\d.]+)-", cluster["docker"]["image"])
    (descriptors,) = re.findall(r"nofile=(\d+)", " ".join(cluster["docker"]["run_options"]))
    variables = [
        f"- {{name: {name}, value: {json.dumps(value)}}}"
        for name, value in start.environment.items()
        if name != "RAY_enable_autoscaler_v2"  # autoscalerOptions says which
    ]
    store = start.options.get("object-store-memory")
    kept = "" if store is None else f'object-store-memory: "{store}"'
    auth = start.environment.get("RAY_AUTH_MODE", "not set")
    return _TEMPLATE.format(
        serve=textwrap.indent(serve.rstrip("\n"), " " * 4, lambda line: bool(line.strip())),
        ray=ray,
        image=image or f"registry.example.com/datamix:{version('datamix-cluster')}",
        idle_s=cluster["idle_timeout_minutes"] * 60,
        grace_s=int(stop_s) + GRACE_MARGIN_S,
        folder=FOLDER,
        descriptors=descriptors,
        environment=textwrap.indent("\n".join(variables), " " * 16),
        port=served["http_options"]["port"],
        least=worker["min_workers"],
        most=worker["max_workers"],
        cpus=worker["resources"]["CPU"],
        gpus=worker["resources"]["GPU"],
        requested=worker["resources"]["CPU"] - SPARE_CPUS,
        spare=SPARE_CPUS,
        machine=worker["node_config"].get("InstanceType", "worker"),
        store=f"\n        {kept}" if kept else "",
        store_worker=f"\n          {kept}" if kept else "",
        auth=f"RAY_AUTH_MODE is {auth}",
    )


def containerfile(cluster: dict[str, Any]) -> str:
    """The Containerfile, with the image and the packages of cluster.yaml."""
    (setup,) = cluster["setup_commands"]
    words = shlex.split(setup)
    packages = " ".join(shlex.quote(word) for word in words[words.index("-c") + 2 :])
    lines = textwrap.wrap(packages, 90, break_long_words=False, break_on_hyphens=False)
    return _CONTAINERFILE.format(
        image=cluster["docker"]["image"],
        folder=FOLDER,
        packages=" \\\n".join(f"    {line}" for line in lines),
    )


def main() -> None:
    """Print the manifest, or write both files."""
    parser = argparse.ArgumentParser(description="the files of cluster/kubernetes")
    parser.add_argument("--write", action="store_true", help="write both instead of printing one")
    parser.add_argument("--image", help="what the pods run; else a name that stands for one")
    options = parser.parse_args()
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    made = build(cluster, (ROOT / "deployments/serve.yaml").read_text(), options.image)
    if not options.write:
        print(made, end="")
        return
    (TARGET / "rayservice.yaml").write_text(made)
    (TARGET / "Containerfile").write_text(containerfile(cluster))


if __name__ == "__main__":
    main()

"""Values for the chart kube-prometheus-stack, made of the rules, alerts and scrape configuration.

python -m cluster.monitoring.helm         # writes helm-values.yaml anew
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
VALUES = FOLDER / "helm-values.yaml"

_HEAD = """\
# Values for the Helm chart kube-prometheus-stack (prometheus-community): our rules and alerts, the
# pods of KubeRay as targets, boards from a ConfigMap. Commands: docs/monitoring.md. Made by
# `python -m cluster.monitoring.helm` of prometheus.yml, rules.yml and alerts.yml: change those.
"""

# The Operator's spelling of what Prometheus calls otherwise.
_SPELLED = {"source_labels": "sourceLabels", "target_label": "targetLabel"}


def values() -> dict[str, Any]:
    """What the chart is to be told."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (ray,) = (job for job in config["scrape_configs"] if job["job_name"] == "ray")
    return {
        "additionalPrometheusRulesMap": {
            name: yaml.safe_load((FOLDER / f"{name}.yml").read_text())
            for name in ("rules", "alerts")
        },
        "prometheus": {"additionalPodMonitors": [_pods(ray, config["global"]["scrape_interval"])]},
        # The chart's own sidecar looks for ConfigMaps with this label, in all namespaces.
        "grafana": {
            "sidecar": {
                "dashboards": {
                    "enabled": True,
                    "label": "grafana_dashboard",
                    "labelValue": "1",
                    "searchNamespace": "ALL",
                }
            }
        },
    }


def _pods(ray: dict[str, Any], interval: str) -> dict[str, Any]:
    """The PodMonitor: KubeRay gives each pod of a cluster its label, and a port named metrics."""
    return {
        "name": "datamix",
        "namespaceSelector": {"any": True},
        "selector": {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]},
        "podMetricsEndpoints": [
            {
                "port": "metrics",
                "interval": interval,
                # The job that alerts ask for; the Operator's own would be the monitor's name.
                "relabelings": [{"targetLabel": "job", "replacement": ray["job_name"]}],
                "metricRelabelings": [
                    {_SPELLED.get(name, name): value for name, value in rule.items()}
                    for rule in ray["metric_relabel_configs"]
                ],
            }
        ],
    }


def text() -> str:
    """The whole file."""
    return _HEAD + yaml.safe_dump(values(), sort_keys=False, width=1000)


def main() -> None:
    """Write the file."""
    VALUES.write_text(text())


if __name__ == "__main__":
    main()

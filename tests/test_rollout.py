"""A deployment that waits, and goes back where the new version fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.rollout import connect, deploy, last_error, read_settings
from datamix.errors import ConfigError, Unavailable
from tests.jobs import Clock

ROOT = Path(__file__).parents[1]
TRACEBACK = """A replica failed to start with exception. Error:
Traceback (most recent call last):
  File "x.py", line 1, in y
datamix.errors.BundleError: block 0 fails its canaries
The above exception was the direct cause of the following exception:
"""


class FakeServe:
    """Serve as its REST API shows it; each application takes a few looks to come up."""

    def __init__(self, clock: Clock, **running: dict[str, Any]) -> None:
        self.clock = clock
        self.deployed: list[dict[str, Any]] = []
        self.applications: dict[str, dict[str, Any]] = {
            name: {"name": name, "deployed_app_config": config, "status": "RUNNING"}
            for name, config in running.items()
        }
        self.looks = 0

    def deploy_applications(self, config: dict[str, Any]) -> None:
        self.deployed.append(config)
        self.looks = 0
        self.applications = {
            each["name"]: {"name": each["name"], "deployed_app_config": each, "status": "DEPLOYING"}
            for each in config["applications"]
        }

    def get_serve_details(self) -> dict[str, Any]:
        self.looks += 1
        if self.looks > 3:
            for application in self.applications.values():
                end = application["deployed_app_config"].get("args", {}).get("end", "RUNNING")
                application["status"] = end
                if end == "DEPLOY_FAILED":
                    application["deployments"] = {"Backbone": {"message": TRACEBACK}}
        return {"applications": self.applications}

    def sleep(self, seconds: float) -> None:
        self.clock.now += seconds


def application(end: str = "RUNNING", name: str = "datamix") -> dict[str, Any]:
    return {"name": name, "args": {"end": end}}


def run(serve: FakeServe, *applications: dict[str, Any]) -> None:
    config = {"http_options": {"port": 8000}, "applications": list(applications)}
    deploy(serve, config, within_s=60, clock=serve.clock, sleep=serve.sleep)


def test_it_waits_until_everything_runs() -> None:
    serve = FakeServe(Clock())
    run(serve, application(), application(name="other"))
    assert [app["status"] for app in serve.applications.values()] == ["RUNNING", "RUNNING"]
    assert len(serve.deployed) == 1


def test_what_ran_before_is_deployed_again_where_the_new_one_fails() -> None:
    before = {"name": "datamix", "args": {"bundle": "old"}}
    serve = FakeServe(Clock(), datamix=before)
    with pytest.raises(
        Unavailable,
        match="^datamix was not deployed: BundleError: block 0 fails its canaries; what ran before "
        "runs on$",
    ):
        run(serve, application("DEPLOY_FAILED"))
    assert serve.deployed[1] == {"http_options": {"port": 8000}, "applications": [before]}
    assert serve.applications["datamix"]["status"] == "RUNNING"


def test_one_that_never_comes_up_is_given_up() -> None:
    before = {"name": "datamix"}
    serve = FakeServe(Clock(), datamix=before)
    with pytest.raises(
        Unavailable,
        match="^datamix was not deployed within 60 s, it is DEPLOYING: no reason given; what ran",
    ):
        run(serve, application("DEPLOYING"))
    assert serve.deployed[1]["applications"] == [before]
    assert 160 < serve.clock() < 170


def test_the_first_deployment_has_nothing_to_go_back_to() -> None:
    serve = FakeServe(Clock())
    with pytest.raises(Unavailable, match="nothing ran before that could be gone back to$"):
        run(serve, application("DEPLOY_FAILED"))
    assert len(serve.deployed) == 1


def test_it_says_where_going_back_fails_too() -> None:
    before = {"name": "datamix", "args": {"end": "DEPLOY_FAILED"}}
    serve = FakeServe(Clock(), datamix=before)
    with pytest.raises(Unavailable, match="was deployed again and failed too: datamix was not"):
        run(serve, application("DEPLOY_FAILED"))


def test_the_reason_is_the_last_line_of_the_traceback() -> None:
    assert last_error(["", TRACEBACK]) == "BundleError: block 0 fails its canaries"
    assert last_error(["first", "second\n"]) == "second"
    assert last_error([]) == "no reason given"


def test_the_shipped_configuration_is_read() -> None:
    found = read_settings(ROOT / "deployments" / "serve.yaml")
    (application,) = found["applications"]
    (backbone,) = application["deployments"]
    assert backbone["max_surge_percent"] > 0, "an update would stop replicas before it starts any"
    assert found["http_options"]["port"] == 8000


def test_what_is_no_configuration_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    with pytest.raises(ConfigError, match="cannot be read: .*No such file"):
        read_settings(path)
    path.write_text("applications: [{name: a")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(path)
    path.write_text("applications: [{name: a}]")
    with pytest.raises(ConfigError, match="no Serve configuration, at applications.0.import_path"):
        read_settings(path)


def test_no_dashboard_is_one_sentence() -> None:
    with pytest.raises(Unavailable, match="^no Ray dashboard answers at 'nowhere': "):
        connect("nowhere")

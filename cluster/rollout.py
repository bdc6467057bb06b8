"""`datamix deploy`: `serve deploy` that waits, and goes back by itself where the new one fails.

A redeployment starts new replicas beside the old ones, which stop only as new ones are ready. Where
the new ones fail to start (a bundle that cannot be read, canaries that do not fit, code that does
not import), Serve stops the update and leaves the old replicas running. But from then on it would
replace none of them that dies, since what it wants is the version that failed. So what ran before
is deployed again, which restarts nothing: the old replicas are that version.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from datamix.errors import ConfigError, Unavailable

_LOOK_S = 1.0
_GO_BACK_S = 120.0

Settings = dict[str, Any]


class Serve(Protocol):
    """Ray Serve's REST API, as :class:`ray.dashboard.modules.serve.sdk.ServeSubmissionClient`."""

    def get_serve_details(self) -> Settings:
        """What runs."""
        ...

    def deploy_applications(self, config: Settings) -> None:
        """Make this what shall run; other applications are taken down."""
        ...


def deploy(
    serve: Serve,
    config: Settings,
    *,
    within_s: float,
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Deploy all applications of a Serve configuration; if one fails, what ran before.

    Args:
        serve: the cluster.
        config: a Serve configuration, as `deployments/serve.yaml`.
        within_s: how long it may take until all of it runs.
        say: called with one line of progress.
        clock: monotonic seconds.
        sleep: waits for so many seconds.

    Raises:
        Unavailable: it failed to run, and why; what ran before runs again, if anything did.
    """
    names = [application["name"] for application in config["applications"]]
    before = [
        details["deployed_app_config"]
        for details in _applications(serve).values()
        if details.get("deployed_app_config") is not None
    ]
    serve.deploy_applications(config)
    say(f"waiting until {', '.join(names)} runs")
    reason = _wait(serve, names, within_s, clock, sleep)
    if reason is None:
        return
    if not before:
        raise Unavailable(f"{reason}; nothing ran before that could be gone back to")
    say("going back to what ran before")
    serve.deploy_applications(config | {"applications": before})
    names = [application["name"] for application in before]
    if (again := _wait(serve, names, _GO_BACK_S, clock, sleep)) is not None:
        raise Unavailable(f"{reason}; what ran before was deployed again and failed too: {again}")
    raise Unavailable(f"{reason}; what ran before runs on")


def _wait(
    serve: Serve,
    names: list[str],
    within_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> str | None:
    """Wait until all of these run; why they do not, where they do not."""
    deadline_s = clock() + within_s
    while True:
        found = _applications(serve)
        states = {name: found.get(name, {}).get("status", "NOT_STARTED") for name in names}
        failed = [name for name in names if states[name] == "DEPLOY_FAILED"]
        if failed:
            return f"{failed[0]} was not deployed: {_why(found[failed[0]])}"
        waiting = [name for name in names if states[name] != "RUNNING"]
        if not waiting:
            return None
        if clock() > deadline_s:
            name = waiting[0]
            return (
                f"{name} was not deployed within {within_s:g} s, it is {states[name]}: "
                f"{_why(found.get(name, {}))}"
            )
        sleep(_LOOK_S)


def _applications(serve: Serve) -> dict[str, Settings]:
    applications: dict[str, Settings] = serve.get_serve_details().get("applications", {})
    return applications


def _why(details: Settings) -> str:
    deployments = details.get("deployments", {}).values()
    return last_error([details.get("message", ""), *(d.get("message", "") for d in deployments)])


def last_error(texts: Iterable[str]) -> str:
    """The last line of the last traceback among Serve's messages, or their last line at all."""
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Found|Large): ", line)]
    last: str = (raised or lines or ["no reason given"])[-1]
    return last.removeprefix("datamix.errors.")


def read_settings(path: Path) -> Settings:
    """Read a Serve configuration from a YAML file.

    Raises:
        ConfigError: it is none.
    """
    import yaml
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        found = yaml.safe_load(path.read_text())
        schema = ServeDeploySchema.model_validate(found)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ConfigError(f"{path} is no Serve configuration, at {where}: {first['msg']}") from None
    settings: Settings = schema.model_dump(mode="json", exclude_unset=True)
    return settings


def connect(address: str) -> Serve:
    """Serve of the cluster whose dashboard is at ``address``.

    Raises:
        Unavailable: nobody answers there.
    """
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    try:
        client: Serve = ServeSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        sentence = " ".join(str(error).split())
        raise Unavailable(f"no Ray dashboard answers at {address!r}: {sentence}") from None
    return client

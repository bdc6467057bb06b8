"""The application with an engine that hangs, or fails on one input, when a file says so.

tests.faulty:app, with FAULTS=/some/folder in its environment

FOLDER/hang     the next replica that starts a batch removes the file and hangs in that batch
FOLDER/poison   the next request of all becomes one that every engine fails on from then on: its
                digest is written to FOLDER/poisoned
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.app import defaults
from deployments.backbone import Backbone
from deployments.config import Config
from deployments.engine import Engine, Pending, Rows


class Faults:
    """Stands before an engine's ``start``."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._start = engine.start
        self._hang, self._poison = folder / "hang", folder / "poison"
        self._poisoned = folder / "poisoned"

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        probe = all(not rows.features.any() for rows in requests)
        if not probe and self._took(self._hang):
            threading.Event().wait()
        if not probe and self._took(self._poison):
            self._poisoned.write_text(digest(requests[0]))
        if self._poisoned.exists():
            bad = self._poisoned.read_text()
            if any(digest(rows) == bad for rows in requests):
                raise RuntimeError("this input does not agree with me")
        return self._start(block, requests)

    @staticmethod
    def _took(file: Path) -> bool:
        """Whether the file was there, and it was us who removed it."""
        try:
            file.unlink()
        except FileNotFoundError:
            return False
        return True


def digest(rows: Rows) -> str:
    return hashlib.sha256(rows.features.tobytes()).hexdigest()


class Faulty(Backbone):
    """A replica with such engines."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for model in self.catalog:
            faults = Faults(model.engine, Path(os.environ["FAULTS"]))
            model.engine.start = faults.start  # type: ignore[method-assign]


def app(config: Config) -> Application:
    """`deployments.app:app` with these replicas."""
    deployment = serve.deployment(**defaults(config))
    bound: Application = deployment(serve.ingress()(Faulty)).bind(config)
    return bound

"""What one replica serves: models by name and version, and how it follows the table.

A version is loaded and warmed in a thread beside the traffic, and requests find it only when it is
ready. Which version is current changes between two requests: one sees the old or the new version,
never a mixture. A version that leaves is found by no new request and answers those it has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

from datamix.errors import DataMixError, NotFound, Unavailable
from deployments.canaries import batch_s, check_slowdown
from deployments.config import Config
from deployments.metrics import Backend
from deployments.model import Loaded, ServedModel, load
from deployments.table import Entry, Table

_DRAIN_S = 30.0  # for the requests that a version has when it leaves
_TURNS = 5  # in which a version and the one that it is to replace are timed

logger = logging.getLogger(__name__)


class Catalog:
    """The models of one replica."""

    def __init__(
        self,
        config: Config,
        backend: Backend,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        table: Table | None = None,
    ) -> None:
        """Load everything that the table names, or the configuration where there is none.

        Raises:
            BundleError: the bundle of a current version cannot be read or trusted.
            ConfigError: the settings do not fit such a bundle or this machine.
        """
        self._config, self._backend, self._loop, self._clock = config, backend, loop, clock
        self._models: dict[str, dict[str, ServedModel]] = {}
        self._current: dict[str, str] = {}
        self._problems: dict[Entry, str] = {}  # why an entry of the table is not served
        self._following = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()
        # All of them before the first one's thread starts, which nobody would stop if one failed.
        if table is None:
            loaded = [load(config, bundle) for bundle in config.bundles or (None,)]
            entries = tuple(each.entry for each in loaded)
            # The first bundle of a model is its current version.
            current = {entry.name: entry.version for entry in reversed(entries)}
            table = Table(configured=config.bundles, entries=entries, current=current)
        else:
            loaded = self._load_all(table)
        for each in loaded:
            self._add(each)
        self._current = dict(table.current)
        self.table = table

    def _load_all(self, table: Table) -> list[Loaded]:
        loaded = []
        for entry in table.entries:
            try:
                loaded.append(_named(entry, load(self._config, entry.bundle)))
            except DataMixError as error:
                # What is current must be there; an old version may be gone from where it was.
                if table.current[entry.name] == entry.version:
                    raise
                self._problems[entry] = str(error)
        return loaded

    def __iter__(self) -> Iterator[ServedModel]:
        """Every version that is served."""
        return iter([m for versions in self._models.values() for m in versions.values()])

    @property
    def current(self) -> list[ServedModel]:
        """The current version of each model, in the order of the table."""
        return [self._models[name][version] for name, version in self._current.items()]

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """The version asked for, by default the current one.

        Raises:
            NotFound: says what there is.
        """
        versions = self._models.get(name)
        if versions is None:
            raise NotFound(f"model is {name[:64]!r}, expected {_one_of(self._models)}")
        found = versions.get(version or self._current[name])
        if found is None:
            raise NotFound(
                f"version of {name!r} is {str(version)[:64]!r}, expected {_one_of(versions)}"
            )
        return found

    def versions(self, name: str) -> list[str]:
        """The versions of one model that are served."""
        return list(self._models[name])

    async def follow(self, table: Table) -> None:
        """Load what the table has more, make current what it says, let go of what it lacks.

        Whatever cannot be loaded is noted and leaves everything else as it was.
        """
        async with self._following:
            if table.revision <= self.table.revision:
                return
            for entry in table.entries:
                if entry.version not in self._models.get(entry.name, {}):
                    await self._load(entry)
            for name, version in table.current.items():
                if version in self._models.get(name, {}):
                    self._current[name] = version
            for model in self:
                # Where a successor could not be loaded here, the old version stays.
                follows = self._current[model.name] != model.version
                if model.entry not in table.entries and (
                    follows or model.name not in table.current
                ):
                    self._remove(model)
            self._problems = {e: why for e, why in self._problems.items() if e in table.entries}
            self.table = table

    async def _load(self, entry: Entry) -> None:
        try:
            loaded = _named(entry, await asyncio.to_thread(load, self._config, entry.bundle))
            await self._compare(loaded)
            self._add(loaded)
            self._problems.pop(entry, None)
        except DataMixError as error:
            self._problems[entry] = str(error)
        except Exception as error:
            logger.exception("a model could not be loaded")
            self._problems[entry] = f"loading failed: {type(error).__name__}"

    async def _compare(self, loaded: Loaded) -> None:
        """Refuse a version much slower than the current one of its model.

        Both are timed in turns, beside the same traffic, and the fastest turn of each counts.
        """
        name, slowdown = loaded.entry.name, self._config.canary_slowdown
        if slowdown is None or name not in self._models:
            return
        current = self._models[name][self._current[name]]
        found_s, current_s = [], []
        for _ in range(_TURNS):
            rows = self._config.max_batch_rows
            found_s.append(await asyncio.to_thread(batch_s, loaded.engine, rows, runs=1))
            current_s.append(await current.batch_s())
        check_slowdown(min(found_s), min(current_s), current.version, slowdown)

    def _add(self, loaded: Loaded) -> None:
        model = ServedModel(loaded, self._config, self._backend, self._loop, self._clock)
        self._models.setdefault(model.name, {})[model.version] = model
        self._current.setdefault(model.name, model.version)

    def _remove(self, model: ServedModel) -> None:
        versions = self._models[model.name]
        del versions[model.version]
        if not versions:
            del self._models[model.name], self._current[model.name]
        task = self._loop.create_task(self._close(model))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _close(self, model: ServedModel) -> None:
        try:
            await model.close(_DRAIN_S)
        except Unavailable as error:
            logger.error("version %s of %s: %s", model.version, model.name, error)

    def status(self) -> list[dict[str, Any]]:
        """Every version of the table as it stands here, for `datamix models`."""
        served = {model.entry: model for model in self}
        rows = []
        for entry in dict.fromkeys((*self.table.entries, *served)):
            model = served.get(entry)
            rows.append(
                {
                    **entry.model_dump(),
                    "state": "ready" if model else "failed",
                    "reason": self._problems.get(entry, ""),
                    "current": bool(model) and self._current[entry.name] == entry.version,
                    "requests": sum(model.outcomes.values()) if model else 0,
                    "queue_rows": model.batcher.queue_rows if model else 0,
                }
            )
        return rows

    async def close(self, timeout_s: float) -> None:
        """Drain every version.

        Raises:
            Unavailable: requests were still waiting after ``timeout_s``.
        """
        drained = await asyncio.gather(
            *(model.close(timeout_s) for model in self), *self._leaving, return_exceptions=True
        )
        for outcome in drained:
            if isinstance(outcome, BaseException):
                raise outcome


def _named(entry: Entry, loaded: Loaded) -> Loaded:
    """What was loaded, if it is what the table says it is.

    Raises:
        NotFound: the bundle has another name or version now.
    """
    found = loaded.entry
    if found != entry:
        raise NotFound(
            f"bundle {entry.bundle!r} holds {found.name!r} {found.version!r}, expected "
            f"{entry.name!r} {entry.version!r}"
        )
    return loaded


def _one_of(names: dict[str, Any]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else "one of " + ", ".join(quoted)

"""`datamix models`: see and change what all replicas of a running application serve.

A change is a new table in the store (:mod:`deployments.table`), and then a call to every replica to
catch up with it. A version becomes current only after every replica has it ready; one that cannot
be loaded somewhere is taken back everywhere.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from cluster.local import APPLICATION
from datamix.errors import ConfigError, NotFound, Unavailable
from deployments.store import RayStore, Store
from deployments.table import Entry, Table, read_table

_LOAD_S = 600.0  # for every replica to read and warm up a model

# Calls a method of every running replica with these arguments, and returns what each answered.
Broadcast = Callable[..., Sequence[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Row:
    """One version of one model over all replicas.

    Attributes:
        name: of the model.
        version: of the model.
        bundle: where it came from; None for the echo model.
        current: whether requests that name no version get it.
        ready: replicas that serve it.
        replicas: replicas there are.
        requests: requests it has answered, over all replicas.
        reason: why a replica does not serve it.
    """

    name: str
    version: str
    bundle: str | None
    current: bool
    ready: int
    replicas: int
    requests: int
    reason: str


class Models:
    """The models of one application, as its operator sees and changes them."""

    def __init__(self, broadcast: Broadcast, store: Store) -> None:
        """Reach every replica by ``broadcast``, and the table by ``store``."""
        self._broadcast = broadcast
        self._store = store

    def list(self) -> list[Row]:
        """Every version that is served or should be.

        Raises:
            Unavailable: no replica answers.
        """
        return _rows(self._answers())

    def load(self, bundle: str, *, promote: bool = False) -> Entry:
        """Load a version on every replica, beside what they serve.

        Args:
            bundle: folder or URI, as the replicas see it.
            promote: whether to make it the current version once it is ready everywhere.

        Raises:
            ConfigError: a replica cannot read the bundle, or they read different ones, or the
                version is loaded already.
            Unavailable: a replica could not load it; then none keeps it.
        """
        entry = self._inspect(bundle)
        table = self._table()
        after = table.loaded(entry)
        try:
            self._change(after)
            self._check_ready(entry)
        except Unavailable:
            self._change(after.without(entry.name, entry.version))
            raise
        if promote and after.current[entry.name] != entry.version:
            self.promote(entry.name, entry.version)
        return entry

    def promote(self, name: str, version: str) -> None:
        """Make a version current on every replica; requests that name none get it from then on.

        Raises:
            NotFound: the model or version is not loaded.
            ConfigError: it is current already.
            Unavailable: not every replica has it ready.
        """
        self._switch(self._table().promoted(name, version), name)

    def rollback(self, name: str) -> str:
        """Make the version current that was so before, and return it.

        Raises:
            NotFound: there is no such model.
            ConfigError: no version was current before, or it is not loaded any more.
            Unavailable: not every replica has it ready.
        """
        after = self._table().rolled_back(name)
        self._switch(after, name)
        return after.current[name]

    def unload(self, name: str, version: str) -> None:
        """Let go of a version on every replica; requests that name it are refused from then on.

        Raises:
            NotFound: the model or version is not loaded.
            ConfigError: it is current, or the last of all.
        """
        self._change(self._table().unloaded(name, version))

    def _switch(self, after: Table, name: str) -> None:
        version = after.current[name]
        (row,) = [r for r in self.list() if (r.name, r.version) == (name, version)]
        if row.ready < row.replicas:
            raise Unavailable(
                f"version {version!r} of {name!r} is ready on {row.ready} of {row.replicas} "
                f"replicas: {row.reason or 'a replica did not follow yet'}"
            )
        self._change(after)

    def _check_ready(self, entry: Entry) -> None:
        """Refuse a version that a replica does not serve."""
        for row in self.list():
            if (row.name, row.version) == (entry.name, entry.version) and row.ready < row.replicas:
                why = row.reason or "a replica did not follow"
                raise Unavailable(f"{entry.bundle!r} was not loaded: {why}")

    def _inspect(self, bundle: str) -> Entry:
        """What every replica finds in the bundle, which must be the same."""
        found = self._broadcast("inspect", bundle)
        for answer in found:
            if "error" in answer:
                raise ConfigError(f"replica {answer['replica']}: {answer['error']}")
        first = found[0]
        if any(answer["hashes"] != first["hashes"] for answer in found):
            raise ConfigError(f"replicas read different bundles at {bundle!r}, expected the same")
        return Entry(name=first["name"], version=first["version"], bundle=bundle)

    def _table(self) -> Table:
        """The newest table there is, in the store or followed by a replica."""
        tables = [read_table(answer["table"].encode()) for answer in self._answers()]
        configured = tables[0].configured
        if (body := self._store.read()) is not None:
            stored = read_table(body)
            if stored.configured == configured:
                tables.append(stored)
        return max(tables, key=lambda table: table.revision)

    def _change(self, table: Table) -> None:
        self._store.write(table.model_dump_json().encode())
        self._answers(follow=True)

    def _answers(self, follow: bool = False) -> Sequence[dict[str, Any]]:
        answers = self._broadcast("models", follow)
        if not answers:
            raise Unavailable("no replica answers")
        return answers


def _rows(answers: Sequence[dict[str, Any]]) -> list[Row]:
    keys = dict.fromkeys(
        (model["name"], model["version"]) for answer in answers for model in answer["models"]
    )
    rows = []
    for name, version in keys:
        found = [
            model
            for answer in answers
            for model in answer["models"]
            if (model["name"], model["version"]) == (name, version)
        ]
        rows.append(
            Row(
                name=name,
                version=version,
                bundle=found[0]["bundle"],
                current=all(model["current"] for model in found),
                ready=sum(model["state"] == "ready" for model in found),
                replicas=len(answers),
                requests=sum(model["requests"] for model in found),
                reason=next((model["reason"] for model in found if model["reason"]), ""),
            )
        )
    return rows


@contextlib.contextmanager
def connected(address: str) -> Iterator[Models]:
    """The models of the application on a running Ray cluster.

    Args:
        address: ``auto`` or ``host:port``.

    Raises:
        Unavailable: the cluster cannot be reached.
        NotFound: the application does not run there.
    """
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise Unavailable(f"no Ray cluster answers at {address!r}: {error}") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        try:
            handle = serve.get_app_handle(APPLICATION)
        except RayServeException:
            _not_there(address)

        def broadcast(method: str, *arguments: Any) -> Sequence[dict[str, Any]]:
            try:
                answers: Sequence[dict[str, Any]] = handle.broadcast(method, *arguments).results(
                    timeout_s=_LOAD_S
                )
            except TimeoutError:
                raise Unavailable(f"a replica did not answer in {_LOAD_S:g} s") from None
            except (RayError, RayServeException) as error:
                raise Unavailable(f"a replica did not answer: {type(error).__name__}") from error
            return answers

        yield Models(broadcast, RayStore(APPLICATION))
    finally:
        ray.shutdown()


def _not_there(address: str) -> NoReturn:
    raise NotFound(f"application {APPLICATION!r} does not run on {address!r}")

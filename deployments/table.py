"""Which models the replicas of an application shall serve: one small table that all of them follow.

The table is a value; each command makes a new one with the next revision. It is kept where every
replica can read it (:mod:`deployments.store`), so that one which starts later, or again, serves
what the others do. Without a table an application serves what its configuration names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from datamix.errors import ConfigError, NotFound

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Entry(_Strict):
    """One version of one model, and where its bundle is.

    Attributes:
        name: of the model.
        version: of the model.
        bundle: folder or URI, as the replicas see it; None for the echo model of a load test.
    """

    name: _Name
    version: _Name
    bundle: str | None


class Table(_Strict):
    """What shall be served.

    Attributes:
        schema_version: of this layout.
        revision: counts up with each change.
        configured: the bundles of the application's configuration when the table was begun; a
            replica with another configuration was deployed anew and does not follow the table.
        entries: every version that shall be loaded.
        current: by model, the version for requests that name none.
        previous: by model, the version that was current before, for a rollback.
    """

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    revision: Annotated[int, Field(ge=0)] = 0
    configured: tuple[str, ...]
    entries: Annotated[tuple[Entry, ...], Field(min_length=1)]
    current: Mapping[str, str]
    previous: Mapping[str, str] = {}

    @model_validator(mode="after")
    def _whole(self) -> Table:
        keys = [(entry.name, entry.version) for entry in self.entries]
        if len(set(keys)) < len(keys):
            raise ValueError("a version of a model is there twice")
        if set(self.current) != {name for name, _ in keys}:
            raise ValueError("each model needs one current version")
        if not set(self.current.items()) <= set(keys):
            raise ValueError("a current version is not among the entries")
        return self

    def versions(self, name: str) -> list[str]:
        """The versions of one model, in the order they were loaded.

        Raises:
            NotFound: there is no such model.
        """
        found = [entry.version for entry in self.entries if entry.name == name]
        if not found:
            raise NotFound(f"model is {name[:64]!r}, expected one of {', '.join(self.current)}")
        return found

    def loaded(self, entry: Entry) -> Table:
        """With one more version, which becomes current only where the model is new.

        Raises:
            ConfigError: the version is there already.
        """
        if any((e.name, e.version) == (entry.name, entry.version) for e in self.entries):
            raise ConfigError(f"version {entry.version!r} of {entry.name!r} is loaded already")
        return self._next(
            entries=(*self.entries, entry),
            current={entry.name: entry.version, **self.current},
        )

    def promoted(self, name: str, version: str) -> Table:
        """With another current version.

        Raises:
            NotFound: the model or version is not loaded.
            ConfigError: it is current already.
        """
        self._check(name, version)
        if self.current[name] == version:
            raise ConfigError(f"version {version!r} of {name!r} is current already")
        return self._next(
            current={**self.current, name: version},
            previous={**self.previous, name: self.current[name]},
        )

    def rolled_back(self, name: str) -> Table:
        """With the version current that was so before; a second time goes forward again.

        Raises:
            NotFound: there is no such model.
            ConfigError: no version was current before, or it was unloaded.
        """
        versions = self.versions(name)
        before = self.previous.get(name)
        if before is None:
            raise ConfigError(f"no other version of {name!r} was current before")
        if before not in versions:
            raise ConfigError(
                f"version {before!r} of {name!r}, current before, was unloaded; load it again"
            )
        return self.promoted(name, before)

    def unloaded(self, name: str, version: str) -> Table:
        """Without one version; without the model, where it was the only one.

        Raises:
            NotFound: the model or version is not loaded.
            ConfigError: it is current while others are loaded, or the last of all.
        """
        self._check(name, version)
        others = [other for other in self.versions(name) if other != version]
        if others and self.current[name] == version:
            raise ConfigError(
                f"version {version!r} of {name!r} is current; promote another one first, such as "
                f"{others[-1]!r}"
            )
        if len(self.entries) == 1:
            raise ConfigError(f"{name!r} is the only model, and an application cannot be without")
        return self.without(name, version)

    def without(self, name: str, version: str) -> Table:
        """Without one version, whatever it is to the others; the caller has made sure."""
        left = tuple(e for e in self.entries if (e.name, e.version) != (name, version))
        names = {entry.name for entry in left}
        return self._next(
            entries=left,
            current={n: v for n, v in self.current.items() if n in names},
            previous={
                n: v for n, v in self.previous.items() if n in names and (n, v) != (name, version)
            },
        )

    def _check(self, name: str, version: str) -> None:
        versions = self.versions(name)
        if version not in versions:
            raise NotFound(
                f"version of {name!r} is {version[:64]!r}, expected one of {', '.join(versions)}"
            )

    def _next(self, **changes: object) -> Table:
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Table.model_validate({**fields, **changes, "revision": self.revision + 1})


def read_table(body: bytes) -> Table:
    """A table from its JSON.

    Raises:
        ConfigError: it is not one.
    """
    try:
        return Table.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ConfigError(f"the table of models is broken at {where}: {first['msg']}") from None

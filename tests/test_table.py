"""The table of models: a value that every command replaces, and that is never half right."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from datamix.errors import ConfigError, NotFound
from deployments.table import Entry, Table, read_table

NAMES = st.sampled_from(["a", "b"])
VERSIONS = st.sampled_from(["1", "2", "3"])


def entry(name: str, version: str) -> Entry:
    return Entry(name=name, version=version, bundle=f"/bundles/{name}-{version}")


def table_of(*entries: Entry, **fields: Any) -> Table:
    current = {each.name: each.version for each in reversed(entries)}
    return Table(**({"configured": ("x",), "entries": entries, "current": current} | fields))


ONE = table_of(entry("a", "1"))
TWO = ONE.loaded(entry("a", "2"))


class TableMachine(RuleBasedStateMachine):
    """Any order of commands, beside a model that is two dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ONE
        self.loaded = {("a", "1")}
        self.current = {"a": "1"}
        self.history: dict[str, str] = {}

    def replace(self, table: Table) -> None:
        assert table.revision == self.table.revision + 1
        assert read_table(table.model_dump_json().encode()) == table
        self.table = table

    @rule(name=NAMES, version=VERSIONS)
    def load(self, name: str, version: str) -> None:
        if (name, version) in self.loaded:
            with pytest.raises(ConfigError, match="loaded already"):
                self.table.loaded(entry(name, version))
            return
        self.replace(self.table.loaded(entry(name, version)))
        self.loaded.add((name, version))
        self.current.setdefault(name, version)

    @rule(name=NAMES, version=VERSIONS)
    def promote(self, name: str, version: str) -> None:
        if (name, version) not in self.loaded:
            with pytest.raises(NotFound):
                self.table.promoted(name, version)
        elif self.current[name] == version:
            with pytest.raises(ConfigError, match="current already"):
                self.table.promoted(name, version)
        else:
            self.replace(self.table.promoted(name, version))
            self.history[name], self.current[name] = self.current[name], version

    @rule(name=NAMES)
    def roll_back(self, name: str) -> None:
        before = self.history.get(name)
        if name not in self.current:
            with pytest.raises(NotFound):
                self.table.rolled_back(name)
        elif before is None or (name, before) not in self.loaded or before == self.current[name]:
            with pytest.raises(ConfigError):
                self.table.rolled_back(name)
        else:
            self.replace(self.table.rolled_back(name))
            self.history[name], self.current[name] = self.current[name], before

    @rule(name=NAMES, version=VERSIONS)
    def unload(self, name: str, version: str) -> None:
        versions = {v for n, v in self.loaded if n == name}
        if version not in versions:
            with pytest.raises(NotFound):
                self.table.unloaded(name, version)
        elif len(self.loaded) == 1 or (self.current[name] == version and len(versions) > 1):
            with pytest.raises(ConfigError):
                self.table.unloaded(name, version)
        else:
            self.replace(self.table.unloaded(name, version))
            self.loaded.remove((name, version))
            if self.history.get(name) == version or len(versions) == 1:
                self.history.pop(name, None)
            if len(versions) == 1:
                del self.current[name]

    @invariant()
    def stands_as_the_model_says(self) -> None:
        assert {(e.name, e.version) for e in self.table.entries} == self.loaded
        assert self.table.current == self.current

    @precondition(lambda self: self.loaded)
    @invariant()
    def never_without_a_model(self) -> None:
        assert self.table.entries


TestTable = TableMachine.TestCase


def test_a_rollback_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="^no other version of 'a' was current before$"):
        TWO.rolled_back("a")
    third = TWO.promoted("a", "2").unloaded("a", "1")
    with pytest.raises(ConfigError, match="^no other version of 'a' was current before$"):
        third.rolled_back("a")


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="^version '1' of 'a' is current; promote .* as '2'$"):
        TWO.unloaded("a", "1")
    with pytest.raises(ConfigError, match="^'a' is the only model"):
        ONE.unloaded("a", "1")
    with pytest.raises(NotFound, match="^version of 'a' is '9', expected one of 1, 2$"):
        TWO.promoted("a", "9")
    with pytest.raises(NotFound, match="^model is 'c', expected one of a$"):
        TWO.promoted("c", "9")


BROKEN = {
    "no JSON": b"{",
    "an unknown field": ONE.model_dump_json().replace('"revision"', '"revisions"').encode(),
    "another schema": ONE.model_dump_json().replace('"schema_version":1', '"schema_version":2'),
    "no entries": json.dumps({"configured": [], "entries": [], "current": {}}),
    "an entry twice": json.dumps(
        {
            "configured": [],
            "entries": [{"name": "a", "version": "1", "bundle": None}] * 2,
            "current": {"a": "1"},
        }
    ),
    "a model without a current version": ONE.model_dump_json().replace('{"a":"1"}', "{}"),
    "a current version nobody loaded": ONE.model_dump_json().replace('{"a":"1"}', '{"a":"2"}'),
    "a name with a slash": ONE.model_dump_json().replace('"name":"a"', '"name":"a/b"'),
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_table_is_one_sentence(body: bytes | str) -> None:
    with pytest.raises(ConfigError, match="^the table of models is broken at "):
        read_table(body.encode() if isinstance(body, str) else body)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_an_error(body: bytes) -> None:
    with pytest.raises(ConfigError):
        read_table(body)

"""Columns of a parquet file, checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from datamix.errors import ConfigError


def read_columns(path: Path, wanted: Mapping[str, Any]) -> pa.Table:
    """Read the columns ``wanted`` (name to Arrow type), without nulls, each in one chunk.

    Raises:
        ConfigError: no parquet file, a column that is missing, of another type, or with nulls.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            for name, kind in wanted.items():
                if name not in schema.names:
                    raise ConfigError(f"{path} has no column {name!r}, expected {list(wanted)}")
                if schema.field(name).type != kind:
                    found = schema.field(name).type
                    raise ConfigError(f"{path}: column {name!r} is {found}, expected {kind}")
            table = file.read(columns=list(wanted)).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        sentence = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path} cannot be read as parquet: {sentence}") from None
    for name in wanted:
        if table[name].null_count:
            raise ConfigError(f"{path}: column {name!r} holds nulls, expected none")
    return table

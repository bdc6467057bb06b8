"""What all parts of a manifest share: nothing unknown, nothing converted, nothing huge."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_VALUES = 1 << 26
"""Of one tensor: 256 MiB in float32."""

_Extent = Annotated[int, Field(ge=1, le=65_536)]
Shape = tuple[_Extent, _Extent, _Extent]


class Strict(BaseModel):
    """A record of a foreign file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

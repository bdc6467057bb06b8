"""What kinds of devices a fleet has: how fast they compute, and by what link they come.

Built-in kinds stand in ``profiles.yaml`` beside this file; a user's file of the same form adds to
them. A mixture says which kinds a fleet has, and which share of the devices each is:

    phone/4g:0.7,laptop/wifi:0.3      kinds of device / kinds of link : weight
    here/4g                           ``here`` computes as fast as the generator does
    laptop                            no link: the machine's own
    mine.yaml                         a file with kinds and with a ``mixture`` of them
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from datamix.errors import ConfigError
from edge.fleet.chance import Purpose, uniform
from edge.fleet.links import Link
from edge.fleet.options import number

HERE = "here"
STAGES = ("stem", "mix", "encode", "demix", "head")
BUILT_IN = Path(__file__).with_name("profiles.yaml")
_MOST = 255  # what the table's column holds
_MOST_BYTES = 1 << 20
_DEEPEST = 10


@dataclass(frozen=True, slots=True)
class Times:
    """How long a kind of device takes, in seconds; None where that really runs.

    Attributes:
        stem_s: preprocessing and stem of one group.
        mix_s: mixing one round's features.
        encode_s: making one message.
        demix_s: de-mixing one answer, and the bridge after it.
        head_s: the head, once per group.
    """

    stem_s: float | None = None
    mix_s: float | None = None
    encode_s: float | None = None
    demix_s: float | None = None
    head_s: float | None = None

    @property
    def charged(self) -> tuple[str, ...]:
        """The stages that are charged and don't count with what they take here."""
        return tuple(stage for stage in STAGES if getattr(self, f"{stage}_s") is not None)


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of device behind one kind of link.

    Attributes:
        name: ``device``, or ``device/link``.
        share: of the fleet's devices; the shares of a mixture add up to 1.
        times: how fast it computes.
        link: how it is connected; None for the machine's own link.
        source: where the figures come from.
    """

    name: str
    share: float = 1.0
    times: Times = Times()
    link: Link | None = None
    source: str = ""


def assign(profiles: Sequence[Profile], devices: NDArray[Any], seed: int) -> NDArray[np.uint8]:
    """Give each device a profile, as a place in ``profiles``; drawn by the device's number.

    devices: (n,) whole numbers.
    """
    bounds = np.cumsum([profile.share for profile in profiles])
    drawn = uniform(seed, Purpose.PROFILE, devices)
    places = np.searchsorted(bounds, drawn, side="right")
    return np.minimum(places, len(profiles) - 1).astype(np.uint8)


# --- what people write ----------------------------------------------------------------------------

Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]
Bandwidth = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Source = Annotated[str, Field(max_length=500)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Written(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DeviceKind(_Written):
    """A kind of device as it stands in a file; a time that is left out really runs."""

    stem_s: Seconds | None = None
    mix_s: Seconds | None = None
    encode_s: Seconds | None = None
    demix_s: Seconds | None = None
    head_s: Seconds | None = None
    source: Source = ""

    @property
    def times(self) -> Times:
        """The times alone."""
        return Times(self.stem_s, self.mix_s, self.encode_s, self.demix_s, self.head_s)


class LinkKind(_Written):
    """A kind of link as it stands in a file."""

    up_mbit_per_s: Bandwidth
    down_mbit_per_s: Bandwidth
    round_trip_s: Seconds
    jitter_s: Seconds = 0.0
    loss: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    source: Source = ""

    @property
    def link(self) -> Link:
        """The link in bytes."""
        return Link(
            self.up_mbit_per_s * 1e6 / 8,
            self.down_mbit_per_s * 1e6 / 8,
            self.round_trip_s,
            self.jitter_s,
            self.loss,
        )


class Kinds(_Written):
    """A file of kinds, and maybe of what a fleet is made of.

    Attributes:
        devices: kinds of device by name.
        links: kinds of link by name.
        mixture: ``device`` or ``device/link`` and its weight.
    """

    devices: dict[Name, DeviceKind] = {}
    links: dict[Name, LinkKind] = {}
    mixture: dict[str, Weight] = {}


def read(text: str) -> tuple[Profile, ...]:
    """Read what ``--profiles`` takes: a mixture, or the path of a YAML file that has one.

    Raises:
        ConfigError: a file or a mixture that can't be read, or a kind that nobody described.
    """
    kinds = read_kinds(BUILT_IN)
    if not text.endswith((".yaml", ".yml")):
        return _mix(kinds, _weights(text))
    own = read_kinds(Path(text))
    if not own.mixture:
        raise ConfigError(f"{text} has no mixture, expected one, such as mixture: {{phone/4g: 1}}")
    both = Kinds(
        devices=kinds.devices | own.devices, links=kinds.links | own.links, mixture=own.mixture
    )
    return _mix(both, both.mixture)


def read_kinds(path: Path) -> Kinds:
    """Read a YAML file of kinds.

    Raises:
        ConfigError: no such file, not YAML, or not of that form.
    """
    import yaml  # only who uses profiles needs it

    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path} is larger than {_MOST_BYTES:,} bytes, expected a short file")
        text = path.read_text(encoding="utf-8")
        _check_events(path, text)
        return Kinds.model_validate(yaml.safe_load(text) or {})
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{path} has in {where or 'it'}: {first['msg']}") from None
        sentence = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path} is no YAML file: {sentence}") from None


def _check_events(path: Path, text: str) -> None:
    """Refuse what a short file can say at great length, before anything is made of it.

    A few lines of aliases can stand for billions of values, and brackets within brackets take the
    reader a time that grows with their square.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path} has an alias (*name), expected none")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            raise ConfigError(f"{path} is nested more than {_DEEPEST} deep, expected 3")


def _weights(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, colon, weight = item.partition(":")
        weights[name] = number("profiles", item, weight) if colon else 1.0
        if weights[name] <= 0:
            raise ConfigError(f"profiles got {item!r}, expected a weight above 0")
    if len(weights) != text.count(",") + 1:
        raise ConfigError(f"profiles are {text!r}, expected each kind once")
    return weights


def _mix(kinds: Kinds, weights: dict[str, float]) -> tuple[Profile, ...]:
    if len(weights) > _MOST:
        raise ConfigError(f"the mixture has {len(weights)} kinds, expected at most {_MOST}")
    total = sum(weights.values())
    return tuple(_profile(kinds, name, weight / total) for name, weight in weights.items())


def _profile(kinds: Kinds, name: str, share: float) -> Profile:
    device, slash, link = name.partition("/")
    times, told, line = Times(), [], None
    if device != HERE:
        if device not in kinds.devices:
            known = ", ".join([HERE, *kinds.devices])
            raise ConfigError(f"profile {name!r} has device {device!r}, expected one of {known}")
        times, told = kinds.devices[device].times, [kinds.devices[device].source]
    if slash:
        if link not in kinds.links:
            known = ", ".join(kinds.links)
            raise ConfigError(f"profile {name!r} has link {link!r}, expected one of {known}")
        line = kinds.links[link].link
        told.append(kinds.links[link].source)
    return Profile(name, share, times, line, "; ".join(filter(None, told)))


def charged(profiles: Sequence[Profile], stage: str) -> bool | None:
    """Whether a stage is charged: by all profiles, by none (False), or by some (None)."""
    answers = {stage in profile.times.charged for profile in profiles} or {False}
    return answers.pop() if len(answers) == 1 else None


def as_dicts(profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """Profiles as JSON can hold them."""
    return [dataclasses.asdict(profile) for profile in profiles]


def from_dict(body: Mapping[str, Any]) -> Profile:
    """Read what :func:`as_dicts` made of one profile.

    Raises:
        TypeError: it is none.
    """
    link = body["link"]
    made = {"times": Times(**body["times"]), "link": None if link is None else Link(**link)}
    return Profile(**{**body, **made})

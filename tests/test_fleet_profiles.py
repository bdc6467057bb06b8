"""Kinds of devices and links: what people write, who gets which, and what is measured here."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli import main
from datamix.bundle import read_manifest
from datamix.errors import ConfigError
from edge.device import Parts
from edge.fleet import measuring, profiles, report
from edge.fleet.config import FleetConfig
from edge.fleet.profiles import Profile, Times, read
from edge.fleet.stages import Stages

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles/fashion-mnist-mix"


def test_a_mixture_names_devices_links_and_weights() -> None:
    phone, laptop, here, bare = read("phone/4g:7,laptop/wifi:1.5,here/3g:1,board:0.5")
    assert [phone.share, laptop.share, here.share, bare.share] == pytest.approx(
        [0.7, 0.15, 0.1, 0.05]
    )
    assert phone.name == "phone/4g" and phone.link is not None and bare.link is None
    assert phone.link.up_bytes_per_s == 12e6 / 8 and phone.link.round_trip_s == 0.07
    assert phone.times.charged == profiles.STAGES and here.times == Times()
    assert "assumed" in phone.source and "LTE" in phone.source
    assert phone.times.stem_s > laptop.times.stem_s  # type: ignore[operator]


def test_every_built_in_kind_says_where_its_figures_are_from() -> None:
    kinds = profiles.read_kinds(profiles.BUILT_IN)
    assert set(kinds.devices) == {"microcontroller", "phone", "board", "laptop"}
    assert set(kinds.links) == {"3g", "4g", "5g", "wifi", "fibre"}
    sources = [kind.source for kind in kinds.devices.values()]
    sources += [kind.source for kind in kinds.links.values()]
    for source in sources:
        assert re.search("assumed|measured|WebPageTest", source)
    for device in kinds.devices:
        assert read(device)[0].times.charged == profiles.STAGES
    rates = [read(f"here/{link}")[0].link for link in ("3g", "4g", "5g", "wifi", "fibre")]
    assert all(rate is not None for rate in rates)


def test_a_file_adds_kinds_and_says_the_mixture(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "devices: {glasses: {stem_s: 0.02, source: a guess}}\n"
        "links:\n  4g: {up_mbit_per_s: 8, down_mbit_per_s: 8, round_trip_s: 0.1}\n"
        "mixture: {glasses/4g: 1, phone/wifi: 3}\n"
    )
    glasses, phone = read(str(path))
    assert glasses.times == Times(stem_s=0.02) and glasses.times.charged == ("stem",)
    assert glasses.link is not None and glasses.link.up_bytes_per_s == 1e6  # the file's own 4g
    assert glasses.share == 0.25 and phone.times == read("phone")[0].times


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "device ''"),
        ("fridge", "expected one of here, laptop"),
        ("phone/6g", "expected one of 3g"),
        ("phone:0", "above 0"),
        ("phone:many", "finite number"),
        ("phone:nan", "finite number"),
        ("phone,phone", "each kind once"),
        ("phone/", "link ''"),
        ("none.yaml", "can't be read"),
        (",".join(f"phone{i}" for i in range(300)), "at most 255"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read(text)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"devices: {}", "has no mixture"),
        (b"[1, 2]", "has in it"),
        (b"mixture: {phone: -1}", "mixture.phone"),
        (b"mixture: {phone: .inf}", "mixture.phone"),
        (b"devices: {a b: {}}\nmixture: {phone: 1}", "devices.a b"),
        (b"devices: {a: {stem_s: .nan}}\nmixture: {a: 1}", "devices.a.stem_s"),
        (b"devices: {a: {stem_s: -1}}\nmixture: {a: 1}", "devices.a.stem_s"),
        (b"devices: {a: {stem_ms: 1}}\nmixture: {a: 1}", "devices.a.stem_ms"),
        (b"links: {a: {up_mbit_per_s: 1}}\nmixture: {phone/a: 1}", "links.a.down_mbit_per_s"),
        (
            b"links: {a: {up_mbit_per_s: 0, down_mbit_per_s: 1, round_trip_s: 1}}",
            "links.a.up_mbit_per_s",
        ),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "alias"),
        (b"mixture: !!python/object/apply:os.system ['true']", "no YAML file"),
        (b"mixture: {phone: 1", "no YAML file"),
        (b"[" * 20_000, "more than 10 deep"),
        (b"\xff\xfe\xfd", "can't be read"),
        (b"#" * (1 << 20) + b"#", "larger than"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        read(str(path))


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_a_device_has_its_profile_whoever_asks(seed: int, shards: int, devices: int) -> None:
    kinds = read("phone/4g:0.7,laptop/wifi:0.3")
    whole = profiles.assign(kinds, np.arange(devices), seed)
    for number in range(shards):
        owned = np.arange(number, devices, shards)
        assert np.array_equal(profiles.assign(kinds, owned, seed), whole[owned])


def test_shares_are_what_the_mixture_says() -> None:
    kinds = read("phone/4g:0.7,laptop/wifi:0.25,board:0.05")
    counts = np.bincount(profiles.assign(kinds, np.arange(20_000), 3))
    assert counts / 20_000 == pytest.approx([0.7, 0.25, 0.05], abs=0.02)


def test_the_summary_says_what_ran_and_what_was_charged() -> None:
    def stages(text: str | None, **settings: Any) -> dict[str, str]:
        kinds = read(text) if text else ()
        return report.stages(FleetConfig(url="http://x", profiles=kinds, **settings))

    bundle: dict[str, Any] = {"bundle": "somewhere"}
    ran = {"stem": "cached", "mix": "run", "encode": "run", "demix": "run", "head": "run"}
    assert stages(None, **bundle) == stages("here/4g", **bundle) == ran
    assert set(stages("phone/4g", **bundle).values()) == {"charged"}
    assert set(stages("phone:1,here:1", **bundle).values()) == {"partly charged"}
    assert stages(None, workload="echo") == dict.fromkeys(ran, "none") | {"encode": "run"}


def test_shares_that_leave_devices_over_are_refused() -> None:
    with pytest.raises(ConfigError, match="add up to 1"):
        FleetConfig(url="http://x", workload="echo", profiles=(Profile("a", 0.5),))


# --- measured -------------------------------------------------------------------------------------


def make_device() -> Parts:
    """A device of the shipped bundle's shapes that computes nothing."""
    manifest = read_manifest(BUNDLE)
    first = manifest.blocks[0].input_shape
    bridges = [
        lambda rows, shape=block.input_shape: np.zeros((len(rows), *shape), np.float32)
        for block in manifest.blocks[1:]
    ]
    return Parts(
        manifest,
        lambda rows: np.zeros((len(rows), *first), np.float32),
        bridges,
        lambda rows: np.zeros((len(rows), 10), np.float32),
    )


def test_what_is_measured_is_a_profile_that_a_fleet_takes(tmp_path: Path) -> None:
    ticks = iter(range(10**6))
    found = measuring.measure(
        make_device(), 5, runtime="nothing", machine="a table", clock=lambda: 0.25 * next(ticks)
    )
    # By this clock everything between two looks takes a quarter of a second.
    assert found.kind.stem_s == found.kind.encode_s == 0.25 and found.spread["stem"] == 0
    assert all(getattr(found.kind, f"{stage}_s") > 0 for stage in profiles.STAGES)
    assert found.kind.source.startswith("measured on a table with nothing: medians of 5 groups")
    path = tmp_path / "mine.yaml"
    measuring.write(path, "mine", found.kind, "5g")
    (profile,) = read(str(path))
    assert profile.name == "mine/5g" and profile.times == found.kind.times
    assert profile.link == read("here/5g")[0].link and found.kind.source in profile.source
    measuring.write(path, "mine", found.kind, None)
    assert read(str(path))[0].link is None
    assert all(stage in measuring.table("mine", found) for stage in profiles.STAGES)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "here:"])
def test_a_profile_has_a_name_that_a_mixture_can_hold(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected letters"):
        measuring.write(tmp_path / "a.yaml", name, profiles.DeviceKind(), None)
    with pytest.raises(ConfigError, match=r"expected \.yaml"):
        measuring.write(tmp_path / "a.json", "name", profiles.DeviceKind(), None)
    with pytest.raises(ConfigError, match="can't be written"):
        measuring.write(tmp_path / "none" / "a.yaml", "name", profiles.DeviceKind(), None)


def test_the_command_measures_the_shipped_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "here.yaml"
    with pytest.raises(SystemExit) as left:
        main(["profile-device", str(BUNDLE), "--output", str(path), "--rounds", "3"])
    assert left.value.code == 0
    assert "TorchDevice, 1 thread" in capsys.readouterr().out
    written = yaml.safe_load(path.read_text())
    assert written["mixture"] == {"measured": 1.0}
    assert all(written["devices"]["measured"][f"{stage}_s"] > 0 for stage in profiles.STAGES)
    with pytest.raises(SystemExit) as left:
        main(["profile-device", str(BUNDLE), "--output", str(path), "--link", "6g"])
    assert left.value.code == 2 and "expected one of 3g" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="expected at least 1"):
        measuring.measure(make_device(), 0, runtime="nothing")


def test_stages_begin_anew() -> None:
    stages = Stages()
    stages.mix_s = stages.head_s = 3.0
    stages.clear()
    assert (stages.mix_s, stages.demix_s, stages.head_s) == (0, 0, 0)
    assert asdict(Times()) == dict.fromkeys([f"{stage}_s" for stage in profiles.STAGES])

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datamix import wire
from datamix.bundle import DEVICE, ArchitectureSpec, save_bundle
from datamix.errors import ConfigError
from datamix.models import Architecture, block_shapes, build, count_flops
from datamix.models.costs import bytes_on_wire
from edge.data import load_sample
from edge.search.budget import Costs, DeviceBudget
from edge.search.costs import cost
from edge.search.run import afford
from edge.search.space import Candidate, SearchSpace, make_space

COSTS = Costs(
    edge_flops=20,
    cloud_flops=180,
    cloud_flops_collapsed=80,
    bytes_per_inference=1000,
    round_trips=2,
    parameters_device_bytes=500,
)
SHAPE, CLASSES = (1, 28, 28), 10


def space(*vary: str, options: tuple[str, ...] = ()) -> SearchSpace:
    return make_space("bridgenet", vary, options, input_shape=SHAPE, classes=CLASSES)


def test_shares() -> None:
    assert COSTS.edge_flops_share == 0.1
    assert COSTS.edge_flops_share_collapsed == 0.2


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (DeviceBudget(), None),
        (DeviceBudget(0.2, 20, 1000, 2, 500), None),
        (DeviceBudget(edge_flops_share=0.15), "edge_flops_share 20.0% (collapsed)"),
        (DeviceBudget(edge_flops=19), "edge_flops 20, expected at most 19"),
        (DeviceBudget(bytes_per_inference=999), "bytes_per_inference 1,000"),
        (DeviceBudget(round_trips=1), "round_trips 2, expected at most 1"),
        (DeviceBudget(parameters_device_bytes=499), "parameters_device_bytes 500"),
    ],
)
def test_a_budget_says_what_it_cannot_afford(budget: DeviceBudget, reason: str | None) -> None:
    found = budget.excess(COSTS)
    assert found is None if reason is None else reason in str(found)


def test_a_budget_names_every_excess() -> None:
    found = DeviceBudget(edge_flops=1, round_trips=1).excess(COSTS)
    assert found == "edge_flops 20, expected at most 1; round_trips 2, expected at most 1"


@pytest.mark.parametrize(
    "wrong",
    [
        {"edge_flops_share": 0.0},
        {"edge_flops_share": 1.1},
        {"edge_flops_share": math.nan},
        {"round_trips": 0},
        {"edge_flops": -1},
    ],
)
def test_a_budget_that_nothing_can_keep_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DeviceBudget(**wrong)  # type: ignore[arg-type]


def test_the_grid_is_every_combination() -> None:
    found = list(space("stem_width=16,32", "widths=64,96|96,128", options=("strides=2,2",)))
    assert len(found) == 4
    assert len({*found}) == 4
    assert str(found[1]) == (
        "bridgenet classes=10 input=1,28,28 stem_width=16 strides=2,2 widths=96,128"
    )
    assert [space("stem_width=16,32").label(c) for c in space("stem_width=16,32")] == [
        "stem_width=16",
        "stem_width=32",
    ]


def test_a_network_has_a_space_of_its_own_which_options_narrow() -> None:
    whole = space()
    assert len(whole) == 144
    assert {name for name, _ in whole.vary} == {
        "stem_width",
        "stem_units",
        "neck",
        "rounds",
        "widths",
    }
    assert len(space(options=("rounds=2", "neck=64"))) == 24
    for name in ("convnet", "resnet18"):
        assert len(make_space(name, input_shape=SHAPE, classes=CLASSES)) > 3


def test_defaults_give_way_to_the_data_to_options_and_to_what_is_varied() -> None:
    found = make_space(
        "bridgenet",
        ["rounds=1,2"],
        ["depth=2"],
        input_shape=SHAPE,
        classes=CLASSES,
        defaults={"rounds": 3, "depth": 1, "neck": 96, "input": "3,32,32"},
    )
    assert dict(found.fixed) == {"depth": 2, "neck": 96, "input": "1,28,28", "classes": 10}


@pytest.mark.parametrize("name", ["bridgenet", "convnet", "resnet18"])
def test_every_default_candidate_can_be_built(name: str) -> None:
    shape = (3, 32, 32) if name == "resnet18" else SHAPE
    for candidate in make_space(name, input_shape=shape, classes=CLASSES):
        with torch.device("meta"):
            model = build(Architecture(candidate.architecture, dict(candidate.options)))
        assert model.input_shape == shape


@pytest.mark.parametrize(
    ("vary", "options", "sentence"),
    [
        (["stem_width"], [], "vary is 'stem_width', expected NAME=A,B,C"),
        (["stem_width="], [], "vary is 'stem_width='"),
        (["=1,2"], [], "vary is '=1,2'"),
        (["stem_width=1,,2"], [], "vary is 'stem_width=1,,2'"),
        (["stem_width=1,1"], [], "each of them once"),
        (["stem_width=1", "stem_width=2"], [], "each option once"),
        (["stem_width=1"], ["stem_width=2"], "'stem_width' is given twice"),
        ([], ["depth"], "option is 'depth', expected NAME=VALUE"),
        (
            [f"{name}={','.join(map(str, range(200)))}" for name in "ab"],
            [],
            "40,000 architectures, expected at most 10,000",
        ),
    ],
)
def test_text_that_is_no_grid_is_refused(
    vary: list[str], options: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_space("bridgenet", vary, options, input_shape=SHAPE, classes=CLASSES)


def test_an_unknown_network_needs_something_to_vary() -> None:
    with pytest.raises(ConfigError, match="nothing has no default space"):
        make_space("nothing", input_shape=SHAPE, classes=CLASSES)


def costs_of(candidate: Candidate, dtype: wire.Dtype = "float16") -> Costs:
    return cost(candidate, group_size=4, wire_dtype=dtype, input_shape=SHAPE, classes=CLASSES)


def test_what_cannot_be_built_is_refused_with_the_reason_and_the_rest_is_costed() -> None:
    grid = space("rounds=1,2,9", "stem_width=8,64", options=("widths=16,16", "strides=2,1"))
    within, refused = afford(grid, DeviceBudget(bytes_per_inference=10_000), costs_of)
    assert len(within) + len(refused) == len(grid)
    reasons = {grid.label(one.candidate): one.reason for one in refused}
    assert "rounds is 9" in reasons["rounds=9 stem_width=8"]
    assert "bytes_per_inference" in reasons["rounds=1 stem_width=64"]
    assert [grid.label(one.candidate) for one in within] == [
        "rounds=1 stem_width=8",
        "rounds=2 stem_width=8",
    ]


def test_what_does_not_fit_the_data_is_refused() -> None:
    other = make_space("bridgenet", ["rounds=1"], input_shape=(3, 32, 32), classes=CLASSES)
    _, refused = afford(other, DeviceBudget(), costs_of)
    assert "the network takes (3, 32, 32)" in refused[0].reason


def test_costs_are_those_of_the_network(tmp_path: Path) -> None:
    (candidate,) = space("rounds=2", options=("stem_width=8", "widths=16,24", "strides=2,2"))
    model = build(Architecture("bridgenet", dict(candidate.options)))
    flops = count_flops(model, group_size=4)
    found = costs_of(candidate)
    assert found.edge_flops == flops.edge
    assert found.edge_flops_share == flops.edge_share
    assert found.edge_flops_share_collapsed == flops.edge_share_collapsed
    assert found.round_trips == 2
    # 8x14x14 up, 16x7x7 down and up, 24x4x4 down, two bytes a value.
    assert found.bytes_per_inference == 2 * (8 * 14 * 14 + 2 * 16 * 7 * 7 + 24 * 4 * 4)
    path = tmp_path / "b"
    sample = load_sample()
    save_bundle(
        path,
        model,
        name="x",
        version="1",
        mode="mix",
        group_size=4,
        architecture=ArchitectureSpec(name="bridgenet", options=dict(candidate.options)),
        preprocessing=sample.preprocessing,
        class_names=sample.class_names,
        tolerance=0.01,
        metrics={},
    )
    file_bytes = (path / DEVICE).stat().st_size
    assert 0 < file_bytes - found.parameters_device_bytes < 8192  # names and shapes


@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_bytes_are_those_of_real_messages(dtype: wire.Dtype) -> None:
    (candidate,) = space("rounds=3")
    model = build(Architecture("bridgenet", dict(candidate.options)))
    rows = 8
    sent = 0
    for shapes in block_shapes(model):
        for shape in shapes:
            features = np.random.default_rng(0).standard_normal((rows, *shape)).astype(np.float32)
            sent += len(wire.encode_request(features, request_id="r", dtype=dtype))
    counted = rows * bytes_on_wire(block_shapes(model), dtype)
    assert 0 < sent - counted < 6 * 1536  # the frames of six messages


def test_a_wire_type_changes_nothing_but_bytes() -> None:
    (candidate,) = space("rounds=1")
    full, small = costs_of(candidate, "float32"), costs_of(candidate, "int8")
    assert small.bytes_per_inference == full.bytes_per_inference // 4 + 8
    assert replace(small, bytes_per_inference=full.bytes_per_inference) == full

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge.schedules import SCHEDULES, Schedule, average_decay, curriculum, learning_rate, one_cycle


@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(1, 3000),
    peak=st.floats(1e-5, 1.0),
    warm_up=st.floats(0, 0.9),
)
def test_rates_rise_to_the_peak_and_fall(
    schedule: Schedule, total: int, peak: float, warm_up: float
) -> None:
    rates = [learning_rate(schedule, s, total, peak, warm_up=warm_up) for s in range(total)]
    assert min(rates) > 0
    assert max(rates) <= peak * (1 + 1e-9)
    top = max(range(total), key=rates.__getitem__)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shapes(schedule: Schedule) -> None:
    rates = [learning_rate(schedule, step, 1000, 1.0, warm_up=0.3) for step in range(1000)]
    assert rates[0] < 0.05
    assert max(rates) == pytest.approx(1, abs=1e-3)
    assert rates[150] == pytest.approx(0.5, abs=0.03)
    half_way_down = {"triangle": 0.5, "cosine": 0.5, "one-cycle": 0.5, "constant": 1.0}
    assert rates[650] == pytest.approx(half_way_down[schedule], abs=0.01)
    assert (rates[-1] < 1e-3) == (schedule != "constant")
    assert learning_rate(schedule, 0, 1000, 1.0, warm_up=0) >= 1 / 25


def test_one_cycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=100, cycle_momentum=False
    )
    for step in range(100):
        assert math.isclose(
            one_cycle(step, 100, 3e-3), optimizer.param_groups[0]["lr"], rel_tol=1e-6
        )
        optimizer.step()
        if step < 99:
            theirs.step()


def test_the_average_forgets_the_start_fast() -> None:
    decays = [average_decay(step, 0.99) for step in range(2000)]
    assert decays[0] == 0.1
    assert decays == sorted(decays)
    assert decays[-1] == 0.99
    assert math.prod(decays[:100]) < 1e-8  # what is left of the random weights


def test_a_curriculum_grows_to_one() -> None:
    assert [curriculum(step, 100, 0.5) for step in (0, 25, 50, 99)] == [0, 0.5, 1, 1]
    assert curriculum(0, 100, 0) == 1

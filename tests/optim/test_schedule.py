"""The learning-rate schedule at hand-worked steps."""

import pytest

from moe_lm.optim.schedule import InverseSquareRoot


def test_schedule_warms_up_to_one_and_falls_with_the_root():
    """Update u of a warm-up of 1000 has factor u/1000, then sqrt(1000/u): 1 at 1000, 1/2 at 4000."""
    schedule = InverseSquareRoot(warmup_steps=1000)
    factors = {update: schedule(update - 1) for update in (1, 500, 999, 1000, 1001, 4000, 27_000)}
    assert factors == pytest.approx(
        {1: 0.001, 500: 0.5, 999: 0.999, 1000: 1, 1001: 0.99950037, 4000: 0.5, 27_000: 0.19245009}
    )
    assert max(schedule(step) for step in range(5000)) == schedule(999)
    assert InverseSquareRoot(warmup_steps=1)(0) == 1


def test_a_warm_up_below_one_step_is_a_mistake():
    """Warm-up of 0 steps is refused with its key."""
    with pytest.raises(ValueError, match=r"schedule\.warmup_steps=0"):
        InverseSquareRoot(warmup_steps=0)

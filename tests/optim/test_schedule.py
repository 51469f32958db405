"""The learning-rate schedules at hand-worked steps."""

import pytest

from moe_lm.optim.schedule import Constant, InverseSquareRoot


def test_schedule_warms_up_to_one_and_falls_with_the_root():
    """Update u of a warm-up of 1000 has factor u/1000, then sqrt(1000/u): 1 at 1000, 1/2 at 4000."""
    schedule = InverseSquareRoot(warmup_steps=1000)
    factors = {update: schedule(update - 1, 30_000) for update in (1, 500, 999, 1000, 1001, 4000, 27_000)}
    assert factors == pytest.approx(
        {1: 0.001, 500: 0.5, 999: 0.999, 1000: 1, 1001: 0.99950037, 4000: 0.5, 27_000: 0.19245009}
    )
    assert max(schedule(step, 30_000) for step in range(5000)) == schedule(999, 30_000)
    assert InverseSquareRoot(warmup_steps=1)(0, 10) == 1
    assert not schedule.depends_on_length


def test_the_final_decay_is_a_straight_line_to_zero():
    """The last 200 of 1000 updates have the factors 200/200, 199/200, ..., 1/200; a further update keeps 1/200."""
    constant = Constant(warmup_steps=10, decay_fraction=0.2)
    assert [constant(step, 1000) for step in (0, 9, 799, 800, 801, 900, 999, 1000)] == pytest.approx(
        [0.1, 1, 1, 1, 199 / 200, 0.5, 1 / 200, 1 / 200]
    )
    falling = InverseSquareRoot(warmup_steps=100, decay_fraction=0.5)
    assert falling(399, 1000) == pytest.approx(0.5)  # sqrt(100 / 400)
    assert falling(624, 1000) == pytest.approx(0.4 * 376 / 500)  # sqrt(100 / 625), 376 updates left of 500
    assert constant.depends_on_length


def test_the_warm_up_may_be_limited_to_a_share_of_the_training():
    """A tenth of 200 updates is 20, of 50,000 more than the 1000 asked for, of 3 less than one."""
    schedule = InverseSquareRoot(warmup_steps=1000, max_warmup_fraction=0.1)
    assert [schedule.warmup(count) for count in (200, 50_000, 3)] == [20, 1000, 1]
    assert [schedule(step, 200) for step in (0, 19, 79)] == pytest.approx([0.05, 1, 0.5])
    assert schedule.depends_on_length


def test_wrong_settings_are_refused_by_name():
    for wrong in ({"warmup_steps": 0}, {"max_warmup_fraction": 0}, {"decay_fraction": 1.1}, {"decay_fraction": -0.1}):
        [(key, value)] = wrong.items()
        with pytest.raises(ValueError, match=rf"schedule\.{key}={value}"):
            Constant(**{"warmup_steps": 1, **wrong})

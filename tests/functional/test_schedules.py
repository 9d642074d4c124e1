import math
from itertools import pairwise

import pytest

from rlhf_exp.functional.schedules import warmup_cosine, warmup_decay

both = pytest.mark.parametrize("schedule", [warmup_decay, warmup_cosine], ids=lambda f: f.__name__)
HALF_ROOT = math.sqrt(0.5)  # cos(pi / 4)


def table(schedule, steps, **settings):
    return [schedule(step, **settings) for step in steps]


def test_warmup_decay_table():
    # Four steps up, then 0.9 down over eight.
    values = table(warmup_decay, range(14), warmup_steps=4, total_steps=12, final_scale=0.1)
    up = [0.25, 0.5, 0.75, 1.0]
    down = [1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1]
    assert values == pytest.approx([*up, *down, 0.1], rel=1e-12)


def test_warmup_cosine_table():
    # 0.1 + 0.9 (1 + cos(pi k / 4)) / 2 for k = 0 .. 4.
    values = table(warmup_cosine, range(7), warmup_steps=2, total_steps=6, final_scale=0.1)
    down = [1.0, 0.55 + 0.45 * HALF_ROOT, 0.55, 0.55 - 0.45 * HALF_ROOT, 0.1]
    assert values == pytest.approx([0.5, 1.0, *down], rel=1e-12)


def test_warmup_decay_formula():
    # 1 - (1 - f)(s - w) / (T - w) between the warm-up and the end, here with the seed's defaults.
    for step in range(20, 101):
        expected = 1 - (1 - 0.1) * (step - 20) / (100 - 20)
        value = warmup_decay(step, warmup_steps=20, total_steps=100, final_scale=0.1)
        assert value == pytest.approx(expected, rel=1e-12)


@both
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_never_zero_at_the_first_step_and_one_at_the_end_of_the_warm_up(schedule, warmup_steps):
    settings = {"warmup_steps": warmup_steps, "total_steps": 10, "final_scale": 0.1}
    assert schedule(0, **settings) == 1 / max(1, warmup_steps)
    assert schedule(max(0, warmup_steps - 1), **settings) == 1
    assert schedule(warmup_steps, **settings) == 1


@both
def test_rises_then_falls_without_a_jump(schedule):
    settings = {"warmup_steps": 50, "total_steps": 250, "final_scale": 0.0}
    values = table(schedule, range(251), **settings)
    assert all(a < b for a, b in pairwise(values[:50]))
    assert all(a > b for a, b in pairwise(values[50:]))
    # No step is longer than the longest of its curve: 1/50 up, pi/2 / 200 down.
    jumps = [abs(a - b) for a, b in pairwise(values)]
    assert max(jumps[:50]) <= 1 / 50 + 1e-12
    assert max(jumps[50:]) <= math.pi / 2 / 200


@both
@pytest.mark.parametrize("final_scale", [0.0, 0.1, 1.0])
def test_stays_at_the_final_scale_past_the_end(schedule, final_scale):
    settings = {"warmup_steps": 3, "total_steps": 10, "final_scale": final_scale}
    for step in (10, 11, 14, 17, 1000):
        assert schedule(step, **settings) == pytest.approx(final_scale, abs=1e-15)


@both
def test_a_final_scale_of_one_is_constant_after_the_warm_up(schedule):
    values = table(schedule, range(12), warmup_steps=0, total_steps=10, final_scale=1.0)
    assert values == pytest.approx([1.0] * 12, rel=1e-15)


@both
@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(10, 10), (11, 10), (-1, 10), (0, 0)])
def test_a_warm_up_that_does_not_end_in_time_is_refused(schedule, warmup_steps, total_steps):
    message = rf"warmup_steps={warmup_steps} must be at least 0 and below total_steps={total_steps}"
    with pytest.raises(ValueError, match=message):
        schedule(0, warmup_steps=warmup_steps, total_steps=total_steps, final_scale=0.1)


@both
def test_a_negative_step_is_refused(schedule):
    with pytest.raises(ValueError, match="step=-1 must be at least 0"):
        schedule(-1, warmup_steps=2, total_steps=10, final_scale=0.1)

import pytest

from rlhf_exp.settings import ConfigError
from rlhf_exp.training.optim import AdamWSettings, learning_rates
from rlhf_exp.training.schedules import Constant, Cosine, WarmupDecay, check_schedule

from .test_optim import base, head


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), [1, 1, 1, 1, 1, 1, 1]),
        (WarmupDecay(warmup_steps=2, final_scale=0.2), [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (
            Cosine(warmup_steps=2, final_scale=0.2),
            [0.5, 1, 1, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5), 0.2],
        ),
    ],
)
def test_rates_of_all_groups_follow_the_schedule_a_step_at_a_time(schedule, expected):
    adamw = AdamWSettings(base_lr=0.1, head_lr=10.0).build(base(), head())
    scheduler = schedule.build(adamw, total_steps=6)
    seen = []
    for _ in expected:
        seen.append(learning_rates(adamw))
        adamw.step()
        scheduler.step()
    assert [rates["base"] for rates in seen] == pytest.approx([0.1 * x for x in expected])
    assert [rates["head"] for rates in seen] == pytest.approx([10 * x for x in expected])


@pytest.mark.parametrize("schedule", [WarmupDecay(warmup_steps=6), Cosine(warmup_steps=6)])
def test_a_schedule_that_does_not_fit_is_refused(schedule):
    adamw = AdamWSettings().build(base())
    with pytest.raises(ConfigError, match="schedule: warmup_steps=6 must be at least 0 and"):
        schedule.build(adamw, total_steps=6)
    [problem] = check_schedule(schedule, total_steps=6, field="stage.total_phases")
    assert "schedule.warmup_steps=6 must be below stage.total_phases=6" in problem


@pytest.mark.parametrize("schedule", [Constant(), WarmupDecay(warmup_steps=6), Cosine()])
def test_a_schedule_that_fits_has_no_problems(schedule):
    assert check_schedule(schedule, total_steps=7, field="stage.total_phases") == []

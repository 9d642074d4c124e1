"""Times are those of finished runs of the same shape, scaled to the phases that there will be."""

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.sweeps.expected_time import expected_seconds, finished_runs

CONFIG = {
    "seed": 1,
    "stage": {
        "_target_": "rlhf_exp.stages.ppo.PPO",
        "total_phases": 100,
        "batch_size": 32,
        "kl_coef": 0.1,
    },
    "model": {"_target_": "rlhf_exp.models.scratch.Scratch", "num_layers": 2, "dropout": 0.0},
    "task": {"_target_": "rlhf_exp.tasks.reviews.Reviews"},
    "sampler": {"_target_": "rlhf_exp.rollout.sampler.CachedSampler", "gen_len": 20},
    "reward": None,
}
SECONDS = {"prepare.base": 50.0, "load": 3.0, "rollout": 40.0, "learn": 20.0, "evaluate": 5.0}


def of(**changed: Any) -> dict[str, Any]:
    """The configuration with keys GROUP__KEY changed."""
    config = deepcopy(CONFIG)
    for name, value in changed.items():
        group, _, key = name.partition("__")
        if key:
            config[group][key] = value
        else:
            config[group] = value
    return config


def finish(
    folder: Path, config: Any = CONFIG, seconds: Any = SECONDS, *, at: float | None = None
) -> None:
    """What a run that is done leaves behind."""
    folder.mkdir(parents=True)
    total = {"total": sum(seconds.values())} if isinstance(seconds, dict) else {}
    content = {"seconds": {**seconds, **total} if total else seconds}
    (folder / "result.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "resolved_config.json").write_text(json.dumps(config), encoding="utf-8")
    if at is not None:
        os.utime(folder / "result.json", (at, at))


def test_without_a_run_to_judge_by_nothing_is_known(tmp_path):
    assert expected_seconds(CONFIG, finished_runs(tmp_path)) is None
    assert expected_seconds(CONFIG, finished_runs(tmp_path / "nothing")) is None


def test_it_is_what_a_run_took_apart_from_prepare(tmp_path):
    finish(tmp_path / "run")
    assert expected_seconds(CONFIG, finished_runs(tmp_path)) == 3 + 40 + 20 + 5


def test_phases_scale_and_loading_does_not(tmp_path):
    finish(tmp_path / "run")
    assert expected_seconds(of(stage__total_phases=300), finished_runs(tmp_path)) == 3 + 3 * (
        40 + 20 + 5
    )
    assert (
        expected_seconds(of(stage__total_phases=50), finished_runs(tmp_path))
        == 3 + (40 + 20 + 5) / 2
    )


def test_a_stage_without_phases_takes_as_long_as_before(tmp_path):
    config = {**CONFIG, "stage": {"_target_": "rlhf_exp.stages.sft.SFT", "epochs": 2}}
    finish(tmp_path / "run", config, {"load": 1.0, "train": 8.0})
    assert expected_seconds(config, finished_runs(tmp_path)) == 9


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"stage__kl_coef": 3.0},
        {"model__dropout": 0.5},
        {"optimizer": {"base_lr": 1e-3}},
    ],
)
def test_coefficients_do_not_change_the_shape(tmp_path, change):
    finish(tmp_path / "run", of(**change))
    assert expected_seconds(CONFIG, finished_runs(tmp_path)) == 68


@pytest.mark.parametrize(
    "change",
    [
        {"stage__batch_size": 64},
        {"stage__compute": {"gradient_checkpointing": True}},
        {"model__num_layers": 3},
        {"sampler__gen_len": 21},
        {"task__path": "mine.tsv"},
        {"reward": {"_target_": "rlhf_exp.rewards.http.HttpReward"}},
    ],
)
def test_runs_of_another_shape_say_nothing(tmp_path, change):
    finish(tmp_path / "run", of(**change))
    assert expected_seconds(CONFIG, finished_runs(tmp_path)) is None


def test_the_newest_run_counts_be_it_of_a_sweep_or_not(tmp_path):
    finish(tmp_path / "first", seconds={"rollout": 1.0}, at=1_000)
    finish(tmp_path / "reviews" / "sweeps" / "one" / "0_seed=1", seconds={"rollout": 2.0}, at=3_000)
    finish(tmp_path / "second", seconds={"rollout": 3.0}, at=2_000)
    finish(tmp_path / "other", of(stage__batch_size=1), {"rollout": 4.0}, at=4_000)
    assert expected_seconds(CONFIG, finished_runs(tmp_path)) == 2
    finish(tmp_path / "reviews" / "third", seconds={"rollout": 5.0}, at=5_000)
    assert expected_seconds(CONFIG, finished_runs(tmp_path)) == 5


def test_a_run_that_ended_after_a_step_of_prepare_says_nothing(tmp_path):
    finish(tmp_path / "whole", at=1_000)
    finish(tmp_path / "until=base", seconds={"prepare.base": 50.0}, at=2_000)
    assert expected_seconds(CONFIG, finished_runs(tmp_path)) == 68


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", '{"seconds": {"rollout": 9'),
        ("result.json", '{"after": {}}'),
        ("result.json", "[]"),
        ("result.json", '{"seconds": null}'),
        ("result.json", '{"seconds": {"rollout": "long"}}'),
        ("result.json", '{"seconds": {"rollout": NaN}}'),
        ("result.json", '{"seconds": {"rollout": 1' + 400 * "0" + "}}"),
        ("result.json", 10_000 * "["),
        ("resolved_config.json", '{"stage": {"_tar'),
        ("resolved_config.json", "[]"),
        ("resolved_config.json", None),
    ],
)
def test_what_is_half_written_is_passed_over(tmp_path, name, content):
    finish(tmp_path / "whole", at=1_000)
    finish(tmp_path / "half", at=2_000)
    if content is None:
        (tmp_path / "half" / name).unlink()
    else:
        (tmp_path / "half" / name).write_text(content, encoding="utf-8")
    os.utime(tmp_path / "half" / "result.json", (3_000, 3_000))
    assert expected_seconds(CONFIG, finished_runs(tmp_path)) == 68

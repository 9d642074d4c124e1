"""The keys that are not groups are checked together, unknown ones included."""

import dataclasses

import pytest

from rlhf_exp.runs.config_keys import (
    BEST_OF_N,
    GROUPS,
    MAX_KL_SUM,
    REPORTS_ONLY,
    USES,
    RunSettings,
    Use,
    read_run_settings,
    use_of,
)
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.best_of_n import BestOfN
from rlhf_exp.stages.classifier import TrainClassifier
from rlhf_exp.stages.dpo import DPO
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.stages.preferences import Preferences
from rlhf_exp.stages.reward_model import TrainRewardModel
from rlhf_exp.stages.sft import SFT

CONFIG = {
    "name": "run",
    "seed": 1,
    "prepare_seed": 0,
    "device": "auto",
    "artifacts_dir": "outputs/artifacts",
    "allow_targets": ["mine"],
    "prepare": {"base": {"stage": {"epochs": 2}}},
    "until": None,
    "resume": None,
    "resume_with": ["stage.kl_coef"],
    "max_minutes": None,
    "skip_completed": False,
    "fail_fast": False,
    "gpus": None,
    "jobs_per_gpu": 1,
    "dry_run": True,
}


def test_groups_are_left_to_others():
    own = read_run_settings({**CONFIG, **dict.fromkeys(GROUPS, "anything")})
    assert (own.name, own.seed, own.allow_targets, own.dry_run) == ("run", 1, ("mine",), True)
    assert own == read_run_settings(CONFIG)


@pytest.mark.parametrize("key", sorted(CONFIG))
def test_every_key_is_required(key):
    rest = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(ConfigError, match=rf"^{key}: is required$"):
        read_run_settings(rest)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "a/b"),
        ("name", "../up"),
        ("seed", -1),
        ("seed", True),
        ("prepare_seed", 0.5),
        ("device", ""),
        ("artifacts_dir", ""),
        ("allow_targets", "mine"),
        ("prepare", {"base": None}),
        ("until", ""),
        ("resume_with", "stage.kl_coef"),
        ("max_minutes", 0),
        ("max_minutes", float("nan")),
        ("skip_completed", "perhaps"),
        ("fail_fast", "perhaps"),
        ("gpus", "all"),
        ("jobs_per_gpu", 0),
        ("dry_run", None),
    ],
)
def test_a_bad_value_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"^{key}[.\w]*="):
        read_run_settings({**CONFIG, key: value})


def test_everything_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        read_run_settings({**CONFIG, "seed": -1, "name": "", "sead": 2})
    lines = str(caught.value).splitlines()
    assert [line.partition("=")[0].partition(":")[0] for line in lines] == ["name", "sead", "seed"]
    assert "sead: no such key" in lines


STAGES = (PPO, DPO, SFT, TrainRewardModel, TrainClassifier, Preferences, BestOfN)


def fields_of(kind, prefix="stage."):
    for field in dataclasses.fields(kind):
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.default):
            yield from fields_of(type(field.default), f"{prefix}{field.name}.")


def test_each_key_that_is_listed_is_one():
    keys = {field.name for field in dataclasses.fields(RunSettings)} | GROUPS
    keys |= {key for stage in STAGES for key in fields_of(stage)}
    assert {*USES, MAX_KL_SUM} <= keys
    assert {field.name for field in dataclasses.fields(RunSettings)} <= USES.keys()


def test_a_stage_that_is_named_by_its_class_is_that_class():
    for target, stage in zip((*REPORTS_ONLY, BEST_OF_N), (PPO, DPO, BestOfN), strict=True):
        assert target == f"{stage.__module__}.{stage.__qualname__}"


def test_intervals_do_not_tell_runs_apart_unless_they_choose_weights():
    intervals = {key for stage in STAGES for key in fields_of(stage) if key.endswith("_every")}
    assert len(intervals) >= 4
    assert use_of("stage.resample_every", {}) == Use()  # it changes what is learned
    for key in intervals - {"stage.eval_every", "stage.resample_every"}:
        assert use_of(key, {}) == Use(resume="free", compared=False)
        assert not use_of(f"prepare.base.{key}", {}).compared
    for place in ("", "prepare.base."):
        key = f"{place}stage.eval_every"
        for stage in STAGES:
            target = f"{stage.__module__}.{stage.__qualname__}"
            reports_only = stage in (PPO, DPO)
            assert use_of(key, {f"{place}stage._target_": target}).compared == (not reports_only)


@pytest.mark.parametrize(
    ("key", "use"),
    [
        ("max_minutes", Use(results=False, resume="free", compared=False)),
        ("resume_with", Use(results=False, resume="free", compared=False)),
        ("logger.project", Use(results=False, resume="free", compared=False)),
        ("device", Use(results=False, compared=False)),
        ("seed", Use(compared=False)),
        ("until", Use(compared=False)),
        ("stage.total_phases", Use(resume="larger")),
        ("prepare.base.stage.epochs", Use()),
        ("stage.kl_coef", Use()),
        ("named.by.nobody", Use()),
    ],
)
def test_what_a_key_is_for(key, use):
    assert use_of(key, {}) == use

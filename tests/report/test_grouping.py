import dataclasses

import pytest

from rlhf_exp.report.grouping import (
    group_runs,
    label_of,
    repeated,
    settings_of,
    short_names,
    show_value,
    split_configs,
    varied_parameters,
)
from rlhf_exp.runs.reading import read_runs
from tests.report.build_runs import config, write_run


@pytest.fixture
def runs_of(tmp_path):
    """Runs with the given flat configurations."""
    write_run(tmp_path / "run", {"seed": 1}, [])
    ((run,), _) = read_runs([tmp_path])
    return lambda *configs: [
        dataclasses.replace(run, name=f"run {i}", folder=tmp_path / str(i), config=config)
        for i, config in enumerate(configs)
    ]


def test_parameters_are_what_differs_but_for_seeds_and_places(runs_of):
    first = {
        "seed": 1,
        "prepare_seed": 0,
        "name": "a",
        "stage.kl_coef": 0.1,
        "stage.estimator.gamma": 1.0,
    }
    first |= {"artifacts_dir": "x", "device": "cpu", "logger.project": "p", "model.dtype": "fp32"}
    first |= {"skip_completed": False, "dry_run": False, "hub": None}
    second = dict.fromkeys(first, 2)
    assert varied_parameters(runs_of(first, second)) == [
        "stage.kl_coef",
        "stage.estimator.gamma",
        "model.dtype",
    ]


def test_how_often_a_stage_reports_and_when_a_run_stops_are_no_parameters(runs_of):
    keys = ["max_minutes", "resume_with", "stage.log_every", "stage.checkpoint_every"]
    keys += ["stage.histograms_every", "stage.eval_every", "prepare.base.stage.log_every"]
    ppo = {"stage._target_": "rlhf_exp.stages.ppo.PPO"}
    runs = runs_of(*({**ppo, **dict.fromkeys(keys, value), "seed": value} for value in (1, 2)))
    assert varied_parameters(runs) == []
    assert [group.runs for group in group_runs(runs, [])] == [[0, 1]]


@pytest.mark.parametrize("stage", ["stage", "prepare.base.stage"])
def test_where_the_best_weights_are_kept_how_often_they_are_measured_is_a_parameter(runs_of, stage):
    sft = {f"{stage}._target_": "rlhf_exp.stages.sft.SFT"}
    runs = runs_of(*({**sft, f"{stage}.eval_every": value} for value in (10, 20)))
    assert varied_parameters(runs) == [f"{stage}.eval_every"]


def test_lists_texts_null_and_absence_are_values(runs_of):
    runs = runs_of({"a": [1, 2], "b": None, "c": "x"}, {"a": [1, 3], "b": "null"})
    assert varied_parameters(runs) == ["a", "b", "c"]
    assert varied_parameters(runs_of({"a": 1}, {"a": 1.0})) == ["a"]
    assert varied_parameters(runs_of({"a": [1]}, {"a": [1]})) == []


def test_interpolated_copies_below_prepare_are_no_parameters(runs_of):
    runs = runs_of(*({"prepare.base.task.n": n, "task.n": n, "prepare.x": -n} for n in (1, 2)))
    assert varied_parameters(runs) == ["task.n", "prepare.x"]


def test_of_many_parameters_those_that_change_together_are_one(runs_of):
    keys = [f"model.k{i}" for i in range(9)]
    runs = runs_of(*({**dict.fromkeys(keys, size), "lr": lr} for size in (0, 1) for lr in (1, 2)))
    assert varied_parameters(runs) == ["model.k0", "lr"]
    every = ({f"k{i}": (n + 1) * 7**i for i in range(9)} for n in range(5))
    assert len(varied_parameters(runs_of(*every))) == 9, "a random search: all values differ"


def test_stages_of_different_kinds_are_a_parameter_and_not_their_keys(runs_of):
    ppo = {"stage._target_": "PPO", "stage.kl_coef": 0.1}
    sft = {"stage._target_": "SFT", "stage.epochs": 2}
    assert varied_parameters(runs_of(ppo, sft)) == ["stage"]
    assert varied_parameters(runs_of(ppo, {**ppo, "stage.kl_coef": 1}, sft)) == [
        "stage",
        "stage.kl_coef",
    ]


def preset(name: str, estimator: str, **more: object) -> dict[str, object]:
    """The configuration of a run of a preset of PPO, and its name under the key "preset"."""
    stage = {"_target_": "rlhf_exp.stages.ppo.PPO", "estimator._target_": f"e.{estimator}"}
    return {"preset": name, **{f"stage.{key}": value for key, value in stage.items()}, **more}


def test_presets_of_a_stage_are_named_in_place_of_the_keys_that_they_set(runs_of):
    def named(*configs):
        runs = runs_of(*({k: v for k, v in c.items() if k != "preset"} for c in configs))
        return [
            dataclasses.replace(run, preset=config["preset"])
            for run, config in zip(runs, configs, strict=True)
        ]

    grpo = preset("grpo", "Grouped", **{"stage.scale": "std", "stage.clip": 1, "lr": 1})
    dapo = preset("dapo", "Grouped", **{"stage.scale": "std", "stage.clip": 2, "lr": 1})
    ppo = preset("ppo", "GAE", **{"stage.gamma": 1, "stage.clip": 1, "lr": 2})
    runs = named(ppo, grpo, dapo)
    assert varied_parameters(runs) == ["stage", "lr"]
    labels = [group.label for group in group_runs(runs, ["stage", "lr"])]
    assert labels == ["stage=dapo, lr=1", "stage=grpo, lr=1", "stage=ppo, lr=2"]
    # A key that the user varies within a preset stays.
    assert varied_parameters(named(ppo, grpo, dapo, {**dapo, "stage.clip": 3})) == [
        "stage", "stage.clip", "lr",
    ]  # fmt: skip
    # One preset, with a key varied, is no parameter.
    assert varied_parameters(named(dapo, {**dapo, "stage.clip": 3})) == ["stage.clip"]


LENGTH = {"reward._target_": "rlhf_exp.rewards.length.Length", "reward.target": 16}
KEYWORD = {"reward._target_": "rlhf_exp.rewards.keyword.Keyword", "reward.words": ["great"]}


def test_a_group_of_which_runs_chose_other_options_is_the_parameter(runs_of):
    runs = runs_of(*({**reward, "seed": s} for reward in (LENGTH, KEYWORD) for s in (1, 2)))
    parameters = varied_parameters(runs)
    assert parameters == ["reward"]
    assert [(g.label, g.parameters, g.runs) for g in group_runs(runs, parameters)] == [
        ("reward=Keyword", {"reward": "Keyword"}, [2, 3]),
        ("reward=Length", {"reward": "Length"}, [0, 1]),
    ]
    assert [settings_of(run, ["reward", "x"]) for run in runs[1:3]] == [
        {"reward": "Length", "x": None},
        {"reward": "Keyword", "x": None},
    ]


def test_options_of_options_and_copies_below_prepare_follow_the_group(runs_of):
    whole = {"reward._target_": "Sum", "reward.a._target_": "Term", "reward.a.b._target_": "Length"}
    runs = runs_of(
        *(
            {**option, **{f"prepare.base.{key}": value for key, value in option.items()}}
            for option in (LENGTH, KEYWORD, whole)
        )
    )
    assert varied_parameters(runs) == ["reward"]


def test_keys_that_all_options_have_and_those_that_one_option_varies_are_parameters(runs_of):
    shared = runs_of(LENGTH | {"reward.scale": 1}, KEYWORD | {"reward.scale": 2})
    assert varied_parameters(shared) == ["reward", "reward.scale"]
    # Otherwise runs with other targets would count as seeds of one setting.
    varied = runs_of(LENGTH, LENGTH | {"reward.target": 8}, KEYWORD)
    assert varied_parameters(varied) == ["reward", "reward.target"]
    assert len(group_runs(varied, varied_parameters(varied))) == 3
    assert varied_parameters(varied[:2]) == ["reward.target"], "one option is no choice"


def test_a_group_that_a_run_has_set_to_null_is_one_parameter(runs_of):
    runs = runs_of(LENGTH, {"reward": None})
    assert varied_parameters(runs) == ["reward"]
    assert [g.label for g in group_runs(runs, ["reward"])] == ["reward=null", "reward=Length"]


def test_groups_hold_the_seeds_and_are_sorted_as_numbers(runs_of):
    values = (10.0, 2.0, None, "auto", 10.0, 1e-05)
    runs = runs_of(*({"k": value, "seed": seed} for seed, value in enumerate(values)), {})
    groups = group_runs(runs, ["k"])
    assert [(group.label, group.runs) for group in groups] == [
        ("k=null", [2]),
        ("k=1e-05", [5]),
        ("k=2", [1]),
        ("k=10", [0, 4]),
        ("k=auto", [3]),
        ("run 6", [6]),
    ]


def test_runs_that_differ_in_nothing_are_one_group_named_after_the_experiment(runs_of):
    (group,) = group_runs(runs_of({"name": "reviews", "seed": 1}, {"name": "reviews"}), [])
    assert (group.label, group.parameters, group.runs) == ("reviews", {}, [0, 1])


def test_a_seed_twice_is_said(runs_of):
    runs = runs_of(*({"k": 1, "seed": s, "prepare_seed": p} for s, p in ((1, 0), (1, 1), (1, 0))))
    (line,) = repeated(runs, group_runs(runs, []))
    assert line == (
        f"{runs[2].folder}: the same parameters and seed as {runs[0].folder}; both count"
    )


def test_the_configuration_is_split_into_common_and_differing(runs_of):
    common, differing = split_configs(runs_of({"a": 1, "b": 2}, {}, {"a": 1, "b": 3, "c": 4}))
    assert common == {"a": 1}
    assert differing == {"b": [2, None, 3], "c": [None, None, 4]}
    assert split_configs([]) == ({}, {})


def test_names_and_values_are_short_but_tell_apart():
    assert short_names(
        ["stage.kl_coef", "optimizer.base_lr", "prepare.base.optimizer.base_lr"]
    ) == {
        "stage.kl_coef": "kl_coef",
        "optimizer.base_lr": "optimizer.base_lr",
        "prepare.base.optimizer.base_lr": "base.optimizer.base_lr",
    }
    assert label_of({"stage.kl_coef": 0.30000000000000004, "a": None}) == "kl_coef=0.3, a=null"
    assert show_value("rlhf_exp.rewards.length.Length") == "Length"
    assert show_value([1, "é"]) == '[1, "é"]'
    assert show_value("x" * 50) == "x" * 39 + "…"


def test_a_written_configuration_is_grouped(tmp_path):
    for i, (kl, seed) in enumerate([(0.1, 1), (0.1, 2), (1.0, 1)]):
        write_run(tmp_path / str(i), config(kl_coef=kl, seed=seed), [])
    runs, _ = read_runs([tmp_path])
    groups = group_runs(runs, varied_parameters(runs))
    assert [(group.label, group.runs) for group in groups] == [
        ("kl_coef=0.1", [0, 1]),
        ("kl_coef=1", [2]),
    ]

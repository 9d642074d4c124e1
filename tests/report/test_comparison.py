import pytest

from rlhf_exp.report.comparison import at_equal_cost, improvements, kl_estimates
from rlhf_exp.report.grouping import group_runs, varied_parameters
from rlhf_exp.runs.reading import read_runs
from tests.report.build_runs import config, dpo_config, dpo_rows, write_run


def read(folder):
    runs, problems = read_runs([folder])
    assert problems == []
    groups = group_runs(runs, varied_parameters(runs))
    return groups, [[runs[i] for i in group.runs] for group in groups]


def write_scores(folder, scores, **options):
    for seed, score in enumerate(scores):
        settings = config(seed=seed, **options)
        number = len(list(folder.iterdir())) if folder.exists() else 0
        write_run(folder / str(number), settings, [{"phase": 4, "eval/score": score, "eval/kl": 0}])


def test_each_pair_is_compared_once_with_the_better_one_first(tmp_path):
    write_scores(tmp_path / "s", [1.0, 3.0, 5.0, 7.0, 9.0], kl_coef=0.1)
    write_scores(tmp_path / "s", [2.0, 4.0, 6.0, 8.0, 10.0], kl_coef=0.3)
    write_scores(tmp_path / "s", [20.0, 20.0], kl_coef=1.0)
    write_scores(tmp_path / "s", [30.0], kl_coef=3.0)  # one run says nothing about chance
    found = improvements(*read(tmp_path / "s"), "eval/score")
    pairs = [
        (pair["first"], pair["second"], pair["probability"]["mean"], pair["strata"])
        for pair in found
    ]
    assert pairs == [
        ("kl_coef=1", "kl_coef=0.3", 1.0, 1),
        ("kl_coef=1", "kl_coef=0.1", 1.0, 1),
        ("kl_coef=0.3", "kl_coef=0.1", 0.6, 1),  # of 25 pairs 1 + 2 + 3 + 4 + 5 wins
    ]
    assert found[0]["probability"]["low"] is None
    assert found[2]["probability"]["low"] < 0.6 < found[2]["probability"]["high"]


def test_runs_of_another_reward_are_strata_and_never_compared(tmp_path):
    for name, scale in (("Length", 1.0), ("Keyword", 1000.0)):
        for kl_coef, score in ((0.1, 2.0), (1.0, 1.0)):
            for seed in range(2):
                settings = config(kl_coef=kl_coef, seed=seed) | {"reward": {"_target_": name}}
                lines = [{"phase": 4, "eval/score": scale * score, "eval/kl": 0.1}]
                write_run(tmp_path / f"{name}{kl_coef}{seed}", settings, lines)
    [pair] = improvements(*read(tmp_path), "eval/score")
    assert (pair["first"], pair["second"]) == ("kl_coef=0.1", "kl_coef=1")
    assert (pair["probability"]["mean"], pair["strata"]) == (1.0, 2)


def test_a_swapped_pair_has_its_interval_mirrored(tmp_path):
    # The mean of the first is higher, yet a run of the second mostly scores more.
    write_scores(tmp_path / "s", [0.0, 0.1, 0.2, 0.3, 90.0], kl_coef=0.1)
    write_scores(tmp_path / "s", [1.0, 1.1, 1.2, 1.3, 1.4], kl_coef=1.0)
    [pair] = improvements(*read(tmp_path / "s"), "eval/score")
    assert (pair["first"], pair["probability"]["mean"]) == ("kl_coef=1", 0.8)
    assert pair["probability"]["low"] == pytest.approx(0.4, abs=0.01)
    assert pair["probability"]["high"] == 1.0


def test_many_methods_are_cut_to_the_best(tmp_path):
    for n in range(8):
        write_scores(tmp_path / "s", [n, n + 0.5], lr=(n + 1) * 1e-4)
    found = improvements(*read(tmp_path / "s"), "eval/score")
    assert len(found) == 15
    assert "base_lr=0.0001" not in {pair["second"] for pair in found}


def rows(scores, *, length, seconds):
    """An evaluation after each phase of 64 completions."""
    lines = [{"phase": 0, "eval/score": 0.5, "eval/kl": 0.0}]
    for phase, score in enumerate(scores, 1):
        times = {"time/rollout_s": seconds / 2, "time/learn_s": seconds / 2}
        lines.append({"phase": phase, "sample/len_mean": length, **times})
        lines.append({"phase": phase, "eval/score": score, "eval/kl": score / 10})
    return lines


@pytest.fixture
def unequal(tmp_path):
    """Two settings of which the first samples half as many tokens in twice the time, and DPO."""
    for seed in (1, 2):
        short = rows([0.6, 0.7, 0.8, 0.9], length=10.0, seconds=2.0)
        write_run(tmp_path / f"a{seed}", config(kl_coef=0.1, seed=seed), short)
        long = rows([0.55, 0.65, 0.75, 0.85], length=20.0, seconds=1.0)
        write_run(tmp_path / f"b{seed}", config(kl_coef=1.0, seed=seed), long)
        write_run(tmp_path / f"c{seed}", dpo_config(seed=seed), dpo_rows(seed=seed))
    groups, members = read(tmp_path)
    assert [group.label for group in groups][1:] == [
        "stage=ppo, kl_coef=0.1",
        "stage=ppo, kl_coef=1",
    ]
    return members


def at(members, cost):
    entry = at_equal_cost(members, cost, "eval/score", "eval/kl")
    assert entry["left_out"] == [0], "DPO logs neither"
    found = {g["group"]: (g["score"]["mean"], g["kl"]["mean"], g["spent"]) for g in entry["groups"]}
    return entry["budget"], found


def test_at_equal_tokens_and_in_equal_time_another_one_leads(unequal):
    # 4 phases of 64 x 10 tokens are 2 phases of 64 x 20; 4 phases of 1 s are 2 of 2 s.
    assert at(unequal, "tokens") == (2560, {1: (0.9, 0.09, 2560), 2: (0.65, 0.065, 2560)})
    assert at(unequal, "seconds") == (4, {1: (0.7, 0.07, 4), 2: (0.85, 0.085, 4)})


def test_an_evaluation_beyond_the_budget_counts_if_it_is_near(tmp_path):
    for length, kl_coef in ((10.0, 0.1), (10.4, 0.3), (10.6, 1.0)):
        settings = config(kl_coef=kl_coef)
        write_run(tmp_path / f"{length}", settings, rows([0.6, 0.7], length=length, seconds=1.0))
    entry = at_equal_cost(read(tmp_path)[1], "tokens", "eval/score", "eval/kl")
    assert entry["budget"] == 1280
    assert [group["score"]["mean"] for group in entry["groups"]] == [0.7, 0.7, 0.6]


def test_a_setting_without_an_evaluation_by_then_is_left_out(tmp_path):
    for kl_coef, lines in ((0.1, rows([0.6], length=1.0, seconds=1.0)),
                           (0.3, rows([0.7], length=1.0, seconds=1.0)),
                           (1.0, rows([0.8], length=9.0, seconds=1.0)[1:])):  # fmt: skip
        write_run(tmp_path / f"{kl_coef}", config(kl_coef=kl_coef), lines)
    entry = at_equal_cost(read(tmp_path)[1], "tokens", "eval/score", "eval/kl")
    assert ([g["group"] for g in entry["groups"]], entry["left_out"]) == ([0, 1], [2])


def test_one_setting_alone_is_not_compared(tmp_path):
    write_run(tmp_path / "run", config(), rows([0.6], length=1.0, seconds=1.0))
    assert at_equal_cost(read(tmp_path)[1], "tokens", "eval/score", "eval/kl") is None
    assert improvements(*read(tmp_path), "eval/score") == []


def test_estimates_of_the_kl_are_means_over_phases_of_groups_that_log_them():
    names = ["kl", *(f"kl_{k}{end}" for k in ("k1", "k2", "k3") for end in ("", "_var"))]
    curves = {f"objective/{name}": {"mean": [i, None, i + 1.0]} for i, name in enumerate(names)}
    groups = [{"id": 3, "curves": {"train": curves}}, {"id": 4, "curves": {"train": {}}}]
    [entry] = kl_estimates(groups)
    assert entry == {"group": 3} | {name: i + 0.5 for i, name in enumerate(names)}

import json
from datetime import datetime

import pytest

from rlhf_exp.report import payload as module
from rlhf_exp.report.payload import Names, build_payload
from tests.report.build_runs import (
    best_of_n_config,
    best_of_n_rows,
    config,
    rows,
    samples,
    supervised_rows,
    write_run,
    write_stages,
    write_sweep,
)

MADE = datetime(2026, 11, 21, 2, 0)


def report(*paths, **names):
    payload = build_payload(paths, Names(**names), made=MADE)
    # Whatever was read, it is JSON and UTF-8, which a page and a Markdown file need.
    json.dumps(payload, allow_nan=False, ensure_ascii=False).encode()
    return payload


def point(phase, score, kl):
    return {"phase": phase, "eval/score": score, "eval/kl": kl}


@pytest.fixture
def sweep(tmp_path):
    """Two penalties, the first with three seeds of which one failed on its way."""
    ends = [(0.1, 1, 0.9, 0.3, "done"), (0.1, 2, 0.7, 0.1, "done"), (0.1, 3, 0.2, 9.0, "failed")]
    ends.append((1.0, 1, 0.6, 0.05, "done"))
    for i, (kl_coef, seed, score, kl, status) in enumerate(ends):
        lines = [point(0, 0.5, 0.0), {"phase": 1, "objective/kl": 1 / 3}, point(4, score, kl)]
        settings = config(kl_coef=kl_coef, seed=seed)
        write_run(tmp_path / "sweep" / f"{i}_job", settings, lines, status=status)
    return tmp_path / "sweep"


def test_groups_are_means_over_the_finished_seeds(sweep):
    payload = report(sweep)
    first, second = payload["groups"]
    # Of two seeds .2 apart the interval reaches t(.975, 1) = 12.706 times .1 from their mean.
    assert (first["label"], first["runs"], second["runs"]) == ("kl_coef=0.1", [0, 1, 2], [3])
    assert first["score"] == {"mean": 0.8, "low": -0.4706, "high": 2.071}
    assert first["kl"] == {"mean": 0.2, "low": -1.071, "high": 1.471}
    assert second["score"] == {"mean": 0.6, "low": None, "high": None}
    assert first["path"] == [
        {"phase": 0, "score": 0.5, "kl": 0.0},
        {"phase": 4, "score": 0.8, "kl": 0.2},
    ]
    assert [group["pareto"] for group in payload["groups"]] == [True, True]
    assert first["curves"]["eval"]["eval/kl"] == {
        "mean": [0.0, 0.2],
        "low": [0.0, -1.071],
        "high": [0.0, 1.471],
    }
    assert first["curves"]["train"] == {
        "phase": [1],
        "objective/kl": {"mean": [0.3333], "low": [0.3333], "high": [0.3333]},
    }


def test_the_option_of_a_group_is_a_parameter_by_its_class_in_every_place(tmp_path):
    options = {"Length": {"target_tokens": 16}, "Keyword": {"keywords": ["great"]}}
    for seed in (1, 2, 3):
        for score, (name, keys) in enumerate(options.items()):
            reward = {"_target_": f"rlhf_exp.rewards.{name.lower()}.{name}", **keys}
            lines = [point(4, score + seed / 100, 0.1)]
            write_run(tmp_path / f"{name}{seed}", config(seed=seed) | {"reward": reward}, lines)
    payload = report(tmp_path)
    assert payload["parameters"] == ["reward"]
    assert [group["parameters"] for group in payload["groups"]] == [
        {"reward": "Keyword"},
        {"reward": "Length"},
    ]
    assert {run["parameters"]["reward"] for run in payload["runs"]} == set(options)
    (importance,) = payload["importance"]
    assert importance["parameter"] == "reward"
    assert importance["share"] > 0.9
    assert set(payload["differing"]) == {
        "seed",
        *(f"reward.{key}" for key in ("_target_", "target_tokens", "keywords")),
    }


def test_a_run_that_is_not_done_is_shown_with_its_end_so_far_and_left_out_of_means(sweep):
    payload = report(sweep)
    run = payload["runs"][2]
    assert (run["status"], run["group"], run["final"]["score"]) == ("failed", 0, 0.2)
    assert payload["problems"] == [
        "frontier: 1 run that is not done left out of means, front and importances"
    ]


def test_if_no_run_is_done_the_frontier_shows_them_so_far(sweep):
    for folder in sweep.iterdir():
        status = {"status": "running", "error": None}
        (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    payload = report(sweep)
    assert payload["groups"][0]["score"] == {"mean": 0.6, "low": -0.2957, "high": 1.496}
    assert payload["problems"] == [
        "frontier: no run is done; it shows each run's last evaluation so far"
    ]


def test_a_run_is_described(tmp_path):
    lines = [point(0, 0.5, 0.0), point(2, 0.93216, 0.2), point(4, 0.8, 1 / 3)]
    lines[-1] |= {"eval/entropy": 1.25, "objective/entropy": 9.0, "sample/distinct_3": 0.4}
    folder = write_run(
        tmp_path / "run", config(), lines, shown=samples([0, 4]), status="done", error=None
    )
    payload = report(folder)
    (run,) = payload["runs"]
    assert run["final"] == {
        "score": 0.8,
        "true_reward": None,
        "kl": 0.3333,
        "efficiency": None,
        "entropy": 1.25,
        "distinct_3": 0.4,
        "best_score": 0.9322,
        "seconds": 33.1,
    }
    assert (run["id"], run["name"], run["seed"], run["phases"]) == (0, "run", 1, 4)
    assert run["curves"]["eval"]["eval/score"] == [0.5, 0.9322, 0.8]
    assert len(run["samples"]) == 8
    assert run["samples"][0]["score_after"] == 0.9
    assert (payload["title"], payload["made"]) == ("reviews: 1 run", "2026-11-21 02:00")
    assert (payload["parameters"], payload["differing"]) == ([], {})
    assert payload["common"]["stage.kl_coef"] == 0.3
    assert payload["groups"][0]["label"] == "reviews"
    assert "differ in no parameter" in payload["importance_note"]


def test_a_grid_has_its_importances(tmp_path):
    write_sweep(tmp_path / "s", {"kl_coef": [0.1, 1.0], "lr": [1e-4, 2e-4], "seed": [1, 2, 3]})
    payload = report(tmp_path / "s")
    assert payload["importance"][0]["parameter"] == "stage.kl_coef"
    assert payload["importance"][0]["share"] > 0.9
    assert payload["interactions"][0]["parameters"] == ["stage.kl_coef", "optimizer.base_lr"]
    assert 0 < payload["importance_noise"] < 0.1
    assert payload["differing"]["seed"] == [1, 2, 3] * 4


def test_other_metrics_can_be_asked_for(sweep):
    payload = report(sweep, score="objective/kl", kl="eval/score")
    assert payload["groups"][1]["score"]["mean"] == 0.3333
    assert payload["groups"][1]["kl"]["mean"] == 0.6


def test_supervised_runs_are_shown_without_a_frontier(tmp_path):
    write_run(tmp_path / "sft", config(), supervised_rows())
    payload = report(tmp_path)
    assert payload["groups"][0]["score"] == {"mean": None, "low": None, "high": None}
    assert payload["groups"][0]["pareto"] is False
    assert payload["groups"][0]["path"] == []
    assert payload["metrics"] == {
        "train": ["train/loss", "lr/base"],
        "eval": ["heldout/loss", "heldout/accuracy"],
    }
    assert payload["problems"] == [
        "frontier: no run has eval/score after its phase 0; they have heldout/accuracy,"
        " heldout/loss: name one with --score"
    ]
    assert report(tmp_path, score="heldout/accuracy")["runs"][0]["final"]["score"] == 0.9


def test_stages_of_two_kinds_and_two_sweeps_stand_side_by_side(tmp_path):
    write_sweep(tmp_path / "a", {"seed": [1, 2]})
    write_sweep(tmp_path / "b", {"seed": [1, 2]})
    sft = {"name": "sft", "seed": 1, "stage": {"_target_": "stages.sft.SFT", "epochs": 2}}
    write_run(tmp_path / "c", sft, supervised_rows())
    payload = report(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert [len(group["runs"]) for group in payload["groups"]] == [4, 1]
    assert sum("the same parameters and seed" in problem for problem in payload["problems"]) == 2


def test_the_best_of_n_samples_are_a_line_over_n_beside_other_runs(tmp_path):
    write_sweep(tmp_path / "ppo", {"kl_coef": [0.1, 1.0]})
    for seed in (1, 2):
        settings = best_of_n_config(seed=seed)
        write_run(tmp_path / f"best{seed}", settings, best_of_n_rows())
    best, *others = report(tmp_path)["groups"]
    assert (best["label"], best["runs"]) == ("stage=best_of_n, kl_coef=null", [0, 1])
    assert best["path_axis"] == "n"
    assert [point["phase"] for point in best["path"]] == [1, 2, 4, 8]
    assert best["score"]["mean"] == best["path"][-1]["score"] == 0.93
    assert [group["path_axis"] for group in others] == ["phase", "phase"]


def test_nothing_to_read_is_a_payload_with_problems(tmp_path):
    payload = report(tmp_path)
    assert (payload["runs"], payload["groups"]) == ([], [])
    assert len(payload["problems"]) == 1


def test_runs_of_rubbish_are_a_payload_with_problems(tmp_path):
    for name in ("status.json", "metrics.jsonl", "resolved_config.json", "samples.jsonl"):
        folder = tmp_path / f"broken_{name}"
        write_run(folder, config(), rows(config(), phases=3), shown=samples([0, 3]))
        (folder / name).write_bytes(b"\x00\xff\xfe{\n" * 50)
        nothing = tmp_path / f"only_{name}"
        nothing.mkdir()
        (nothing / name).write_bytes(b"{}\n[")
        (nothing / "status.json").touch()
    payload = report(tmp_path)
    assert len(payload["runs"]) == 8
    for run in payload["runs"]:
        assert any(run["folder"] in problem for problem in payload["problems"])
    statuses = {run["name"]: run["status"] for run in payload["runs"]}
    assert statuses["broken_status.json"] == "done"
    assert statuses["only_metrics.jsonl"] == "unknown"


def test_curves_of_many_runs_are_thinned(tmp_path, monkeypatch):
    write_sweep(tmp_path / "s", {"seed": [1, 2]}, phases=50, eval_every=25)
    # 2 runs and thrice 1 group are 5 copies: of 29 metrics there is room for one phase in 5.
    monkeypatch.setattr("rlhf_exp.report.curve_tables.MAX_NUMBERS", 1450)
    payload = report(tmp_path / "s")
    for owner in (payload["runs"][0], payload["groups"][0]):
        phases = owner["curves"]["train"]["phase"]
        assert phases == [*range(1, 50, 5), 50]
        assert owner["curves"]["eval"]["phase"] == [0, 25, 50]
    assert payload["problems"] == ["curves: one phase in 5, to keep the report small"]
    copies = 5 * len(payload["metrics"]["train"]) * len(phases)
    assert copies < 1.1 * 1450  # the last phase is always kept


def test_long_texts_are_cut_where_prompt_and_completion_meet(tmp_path, monkeypatch):
    shown = samples([0, 4], count=2)
    for row in shown:
        row["prompt"], row["completion"] = "电" * 3000 + "end", "beginning" + "影" * 3000
    folder = write_run(tmp_path / "run", config(), rows(config()), shown=shown)
    sample = report(folder)["runs"][0]["samples"][0]
    assert sample["prompt"].endswith("电end")
    assert sample["prompt"].startswith("…")
    assert sample["before"].startswith("beginning")
    assert [len(sample[name]) for name in ("prompt", "before", "after")] == [2001] * 3
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 6000)
    cut = report(folder)["runs"][0]["samples"]
    assert 5000 < len(json.dumps([list(s.values()) for s in cut])) < 7000


def test_runs_from_different_commits_are_told(sweep):
    jobs = sorted(sweep.iterdir())
    for job, commit in zip(jobs, ("a" * 40, "a" * 40, "b" * 40 + "+"), strict=False):
        (job / "environment.txt").write_text(f"commit {commit}\npython 3.12\n")
    told = "the runs come from different commits, so the code may explain differences: "
    assert f"{told}aaaaaaa (2 runs), bbbbbbb+ (1 run)" in report(sweep)["problems"]
    (jobs[2] / "environment.txt").unlink()
    assert not any(told in problem for problem in report(sweep)["problems"])
    (jobs[0] / "environment-2.txt").write_text(f"commit {'c' * 40}\n")  # a resumed run
    assert f"{told}aaaaaaa (2 runs), ccccccc (1 run)" in report(sweep)["problems"]
    installed = f"commit none\ncode {'d' * 12} of rlhf_exp 1, installed without its repository\n"
    (jobs[0] / "environment-2.txt").write_text(installed)
    assert f"{told}aaaaaaa (2 runs), ddddddd (1 run)" in report(sweep)["problems"]


def test_a_group_with_a_lower_score_at_a_higher_kl_is_not_on_the_front(tmp_path):
    for kl_coef, score, kl in ((0.1, 0.9, 0.3), (1.0, 0.6, 0.5)):
        write_run(tmp_path / f"{kl_coef}", config(kl_coef=kl_coef), [point(4, score, kl)])
    assert [group["pareto"] for group in report(tmp_path)["groups"]] == [True, False]


def test_runs_of_all_stages_are_in_one_frontier_of_the_score_and_one_of_the_true_reward(tmp_path):
    payload = report(write_stages(tmp_path / "s"))
    assert payload["kl"] == "eval/kl_sum"
    groups = {group["label"]: group for group in payload["groups"]}
    best, dpo, ppo, weak, sft = (
        groups[f"stage={name}"]
        for name in (
            "best_of_n, kl_coef=null",
            "dpo, kl_coef=null",
            "ppo, kl_coef=0.1",
            "ppo, kl_coef=1",
            "sft, kl_coef=null",
        )
    )
    assert (best["kl"]["mean"], best["score"]["mean"]) == (1.2, 0.93)
    assert [point["kl"] for point in best["path"]] == [0, 0.2, 0.6, 1.2]
    assert dpo["score"]["mean"] == pytest.approx(0.8, abs=0.05)
    assert sft["score"]["mean"] is None
    assert payload["before"]["score"]["mean"] == 0.52
    # The score of the weakest penalty is the highest, and its KL makes its true reward low.
    assert [group["pareto"] for group in (best, dpo, ppo, weak)] == [True, False, True, False]
    places = [group["true_reward"] for group in (best, dpo, ppo, weak)]
    assert [place["pareto"] for place in places] == [True, False, False, False]
    assert places[0]["score"]["mean"] == 0.87  # the score minus a KL of .06 nats a token
    assert places[0]["path"][1] == {"phase": 2, "score": 0.69, "kl": 0.2}
    assert payload["true_reward"]["score"] == "eval/true_reward"
    assert payload["true_reward"]["before"]["score"]["mean"] == 0.52
    assert payload["runs"][0]["final"]["true_reward"] == 0.87
    assert ppo["iqm"]["low"] < ppo["iqm"]["mean"] < ppo["iqm"]["high"]
    assert len(payload["improvements"]) == 6
    assert [entry["cost"] for entry in payload["equal_cost"]] == ["tokens", "seconds"]
    assert len(payload["kl_estimates"]) == 2
    asked = report(tmp_path / "s", score="eval/true_reward", kl="eval/kl")
    assert (asked["kl"], asked["true_reward"]) == ("eval/kl", None)


def test_curves_know_what_their_runs_have_spent(tmp_path):
    for seed, seconds in ((1, 2.0), (2, 6.0)):
        lines = [point(0, 0.5, 0.0)]
        for phase in (1, 2):
            costs = {"time/rollout_s": seconds, "time/learn_s": 1.0, "sample/len_mean": 20.0}
            lines.append({**costs, **point(phase, 0.6, 0.1)})
        write_run(tmp_path / f"{seed}", config(seed=seed), lines)
    payload = report(tmp_path)
    of_run, of_group = payload["runs"][1]["curves"]["eval"], payload["groups"][0]["curves"]["eval"]
    assert [of_run[name] for name in ("phase", "completions", "tokens", "seconds")] == [
        [0, 1, 2], [0, 64, 128], [0, 1280, 2560], [0, 7, 14],
    ]  # fmt: skip
    assert of_group["seconds"] == [0, 5, 10]
    assert payload["groups"][0]["curves"]["train"]["tokens"] == [1280, 2560]

"""The limit in a report: which lines there are, and what is said of the runs beside them."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from rlhf_exp.report.figures import write_figures
from rlhf_exp.report.limits import POINTS, efficiency
from rlhf_exp.report.markdown import write_markdown
from rlhf_exp.report.payload import Names, build_payload
from rlhf_exp.runs.reading import read_run, read_runs
from tests.report.build_runs import (
    best_of_n_config,
    best_of_n_rows,
    config,
    efficient,
    limit_points,
    rows,
    with_true_reward,
    write_limit,
    write_run,
)


def write(folder: Path, settings: dict[str, Any], points: Any, true_points: Any = ()) -> Path:
    """A run of PPO, efficient by .4, that knows its limit."""
    metrics = with_true_reward(efficient(rows(settings)))
    return write_limit(write_run(folder, settings, metrics), points, true_points)


def report(folder: Path, **names: str) -> dict[str, Any]:
    return build_payload([folder], Names(**names), made=datetime(2026, 11, 21))


def with_reward(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {**settings, "reward": {"_target_": f"rlhf_exp.rewards.x.{name}"}}


STRAIGHT = [(0.0, 0.0, 100.0), (1.0, 1.0, 50.0)]
STEEP = [(0.0, 0.0, 300.0), (3.0, 1.0, 150.0), (4.0, 4.0, 50.0)]


def test_seeds_share_a_line_that_is_their_mean_as_far_as_all_reach(tmp_path: Path) -> None:
    for i, points in enumerate((STRAIGHT, STEEP)):
        for kl_coef in (0.1, 1.0):
            write(tmp_path / f"{kl_coef}_{i}", config(kl_coef=kl_coef, seed=i), points)
    payload = report(tmp_path)
    assert payload["kl"] == "eval/kl_sum"
    (limit,) = payload["limits"]
    assert (limit["label"], limit["samples"]) == ("", 2), "each seed once, whatever the penalty"
    kls = [point["kl"] for point in limit["points"]]
    assert (len(kls), kls[0], kls[-1]) == (POINTS, 0.0, 1.0)
    for point in limit["points"]:
        assert point["score"] == pytest.approx((point["kl"] + 3 * point["kl"]) / 2, abs=1e-3)
        wanted = (100 - 50 * point["kl"] + 300 - 150 * point["kl"]) / 2
        assert point["samples"] == pytest.approx(wanted, rel=1e-3)


def test_a_reward_a_model_and_a_length_have_their_own_lines(tmp_path: Path) -> None:
    settings = [with_reward(config(), "Length"), with_reward(config(), "Keyword")]
    settings.append({**settings[0], "sampler": {"gen_len": 40}})
    settings.append({**settings[0], "optimizer": {"base_lr": 1e-5}})  # has no part in it
    for i, one in enumerate(settings):
        write(tmp_path / str(i), one, STRAIGHT)
    labels = [limit["label"] for limit in report(tmp_path)["limits"]]
    assert len(labels) == 3
    assert {label.partition(",")[0] for label in labels} == {"reward=Length", "reward=Keyword"}


def test_the_true_reward_has_its_own_limit(tmp_path: Path) -> None:
    write(tmp_path / "run", config(), STRAIGHT, STEEP)
    payload = report(tmp_path)
    assert payload["limits"][0]["points"][-1]["score"] == 1.0
    assert payload["true_reward"]["limits"][0]["points"][-1]["score"] == 4.0
    assert report(tmp_path, score="eval/true_reward")["limits"][0]["points"][-1]["score"] == 4.0


def test_there_is_no_line_for_other_numbers_or_equal_scores(tmp_path: Path) -> None:
    write(tmp_path / "run", config(), STRAIGHT)
    assert report(tmp_path)["true_reward"]["limits"] == []
    assert report(tmp_path, kl="eval/kl")["limits"] == []
    assert report(tmp_path, score="eval/entropy")["limits"] == []
    write_limit(tmp_path / "run", [(0.5, 0.0, 1000.0)])  # all samples score the same
    assert report(tmp_path)["limits"] == []


def test_the_best_of_n_shares_the_line_of_its_model(tmp_path: Path) -> None:
    write(tmp_path / "ppo", config(), STRAIGHT)
    best = write_run(tmp_path / "best", best_of_n_config(), best_of_n_rows())
    write_limit(best, STEEP)
    assert [limit["samples"] for limit in report(tmp_path)["limits"]] == [2]


def test_settings_and_runs_have_their_efficiency(tmp_path: Path) -> None:
    for seed, share in ((1, 0.5), (2, 0.7)):
        settings = config(seed=seed)
        write_run(tmp_path / str(seed), settings, efficient(rows(settings), share))
    payload = report(tmp_path)
    (group,) = payload["groups"]
    assert group["efficiency"]["mean"] == 0.6
    assert group["efficiency"]["low"] < 0.5
    assert [run["final"]["efficiency"] for run in payload["runs"]] == [0.5, 0.7]
    assert [point.get("efficiency") for point in group["path"]] == [None, 0.6, 0.6]
    write_markdown(payload, [], tmp_path / "report.md")
    other = config(seed=1, kl_coef=1.0)
    write_run(tmp_path / "other", other, rows(other))
    text = write_markdown(report(tmp_path), [], tmp_path / "report.md").read_text()
    assert "| KL efficiency |" in text
    assert "| 0.6 [-0.671, 1.87] |" in text


def test_an_efficiency_is_of_the_last_evaluation_or_unknown(tmp_path: Path) -> None:
    lines = efficient(rows(config()))
    del lines[-1]["eval/kl_efficiency"]
    assert efficiency(read_run(write_run(tmp_path / "run", config(), lines))) is None
    payload = report(tmp_path)
    assert payload["runs"][0]["final"]["efficiency"] is None
    assert payload["groups"][0]["efficiency"] is None


def test_a_low_efficiency_is_a_warning_with_what_to_try(tmp_path: Path) -> None:
    for name, share in (("low", 0.12), ("enough", 0.3)):
        metrics = efficient(rows(config(kl_coef=0.1)), share)
        metrics[-1] |= {"eval/kl_sum": 2.5}
        write_run(tmp_path / name, config(kl_coef=0.1), metrics)
    enough, low = report(tmp_path)["runs"]
    assert low["warnings"] == [
        "KL efficiency 0.12: the last evaluation's score costs 2.5 nats a completion, where 0.3"
        " would do; try stage.kl_penalty=return, a smaller optimizer.base_lr with a larger"
        " stage.batch_size, or stage.average_weights"
    ]
    assert enough["warnings"] == []


@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"scores": []}', '{"scores": [[1], [1, 2]]}', '{"scores": [[1]], "frontier": [1]}',
     '{"scores": [[1]], "frontier": [[1, NaN, 2]]}',
     '{"scores": [[1]], "frontier": [["<b>", 1, 2], [1, 2, 3]]}'],
)  # fmt: skip
def test_a_damaged_file_is_named_and_its_run_kept(content: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", config(), rows(config()))
    (folder / "limit.json").write_text(content)
    ((run,), problems) = read_runs([folder])
    assert run.limit is None
    assert problems == [f"{folder}/limit.json cannot be read (it is not what a run writes)"]


def test_a_line_of_huge_numbers_does_no_harm(tmp_path: Path) -> None:
    points = [(0.0, 0.0, 1.0), (1.7e308, 1.7e308, 1.0)]
    for seed in (1, 2):
        write(tmp_path / str(seed), config(seed=seed), [*points, (1.7e308, seed, 1.0)])
    assert len(report(tmp_path)["limits"]) == 1


def test_the_limit_is_drawn_as_far_as_the_settings_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, save = {}, Figure.savefig

    def keep(figure: Figure, path: Path, **options: Any) -> None:
        figures[path.name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    points = limit_points(most=50.0)
    for seed in (1, 2, 3):
        write(tmp_path / str(seed), config(seed=seed), points, points)
    best = write_run(tmp_path / "best", best_of_n_config(), best_of_n_rows())
    write_limit(best, points)
    payload = report(tmp_path)
    write_figures(payload, tmp_path / "out")
    for name in ("frontier.png", "true_reward.png"):
        (axis,) = figures[name].axes
        (line,) = [one for one in axis.lines if one.get_label() == "limit: the best at each KL"]
        kls = line.get_xdata().tolist()
        ends = [run["final"]["kl"] for run in payload["runs"]]
        assert max(ends) < kls[-1] < 2 * max(ends)
        wanted = [p["kl"] for p in payload["limits"][0]["points"] if p["kl"] <= kls[-1]]
        assert kls == wanted

from datetime import datetime

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from rlhf_exp.report.figures import choose_groups, write_figures
from rlhf_exp.report.payload import Names, build_payload
from tests.report.build_runs import (
    best_of_n_config,
    best_of_n_rows,
    config,
    rows,
    supervised_rows,
    write_run,
    write_stages,
    write_sweep,
)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, by name."""
    figures, save = {}, Figure.savefig

    def keep(figure, path, **options):
        figures[path.name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def draw(tmp_path, *paths):
    payload = build_payload(paths, Names(), made=datetime(2026, 11, 21))
    written = write_figures(payload, tmp_path / "out")
    assert all(imread(path).std() > 0.01 for path in written)
    return [path.name for path in written], payload


def test_a_sweep_has_frontier_curves_and_parameters(tmp_path, drawn):
    write_sweep(tmp_path / "s", {"kl_coef": [0.03, 0.1, 1.0], "seed": [1, 2, 3]})
    names, payload = draw(tmp_path, tmp_path / "s")
    assert names == ["frontier.png", "curves.png", "costs.png", "parameters.png"]
    (frontier,) = drawn["frontier.png"].axes
    assert {text.get_text() for text in frontier.texts} == {
        "kl_coef=0.03",
        "kl_coef=0.1",
        "kl_coef=1",
    }
    front = next(line for line in frontier.lines if line.get_label() == "Pareto front")
    ends = sorted((group["kl"]["mean"], group["score"]["mean"]) for group in payload["groups"])
    assert list(zip(*front.get_data(), strict=True)) == ends
    assert front.get_drawstyle() == "steps-post", "what is between two settings nobody has reached"
    assert "bars: 95 % t-intervals of the mean" in frontier.get_title(loc="left")
    assert "bands: 95 % t-intervals of the mean" in drawn["curves.png"].get_suptitle()
    scores = drawn["curves.png"].axes[0]
    means = [group["curves"]["train"]["objective/scores"]["mean"] for group in payload["groups"]]
    assert [line.get_ydata().tolist() for line in scores.lines] == means
    assert len(scores.collections) == 3, "a band a group"
    (parameter,) = drawn["parameters.png"].axes
    assert parameter.get_xscale() == "log"
    assert len(parameter.collections[0].get_offsets()) == 9


def test_the_best_of_n_samples_are_a_line_however_many_groups_there_are(tmp_path, drawn):
    lrs = [n * 1e-5 for n in range(1, 13)]
    write_sweep(tmp_path / "s", {"lr": lrs, "seed": [1]}, phases=2)
    far = [{**r, "eval/kl_sum": 90 + r["eval/kl_sum"], "eval/score": 0.1} for r in best_of_n_rows()]
    write_run(tmp_path / "best", best_of_n_config(), far)
    _, payload = draw(tmp_path, tmp_path / "s", tmp_path / "best")
    assert "n" not in {group["path_axis"] for group in choose_groups(payload)}
    (frontier,) = drawn["frontier.png"].axes
    [line] = [line for line in frontier.lines if line.get_marker() == "."]
    points = [(row["eval/kl_sum"], row["eval/score"]) for row in far]
    assert list(zip(*line.get_data(), strict=True)) == points
    assert line.get_alpha() == 1
    assert "lines through points: the best of n samples" in frontier.get_title(loc="left")


def test_many_groups_show_eight_of_them_with_those_on_the_front(tmp_path, drawn):
    write_sweep(tmp_path / "s", {"lr": [n * 1e-5 for n in range(1, 13)], "seed": [1]}, phases=2)
    _, payload = draw(tmp_path, tmp_path / "s")
    chosen = choose_groups(payload)
    assert len(chosen) == 8
    assert {g["id"] for g in payload["groups"] if g["pareto"]} <= {g["id"] for g in chosen}
    assert len(drawn["curves.png"].axes[0].lines) == 8


def test_of_a_long_front_groups_are_shown_evenly_along_it():
    groups = [
        {"id": i, "pareto": True, "score": {"mean": i / 20}, "kl": {"mean": i / 20}}
        for i in range(15)
    ]
    assert [g["id"] for g in choose_groups({"groups": groups})] == [0, 2, 4, 6, 8, 10, 12, 14]


def test_words_lists_and_dollars_are_places_on_the_axis(tmp_path, drawn):
    for i, value in enumerate([None, "$x$", [1, 2], "$x$"]):
        settings = config(seed=i)
        settings["stage"]["kind"] = value
        write_run(tmp_path / f"s/{i}", settings, rows(settings))
    draw(tmp_path, tmp_path / "s")
    labels = [label.get_text() for label in drawn["parameters.png"].axes[0].get_xticklabels()]
    assert labels == [r"\$x\$", "[1, 2]", "null"]


def test_supervised_runs_have_curves_alone(tmp_path, drawn):
    write_run(tmp_path / "sft", config(), supervised_rows())
    assert draw(tmp_path, tmp_path / "sft")[0] == ["curves.png"]
    assert [axis.get_title("left") for axis in drawn["curves.png"].axes] == [
        "train/loss",
        "heldout/loss",
        "heldout/accuracy",
    ]


def test_runs_without_metrics_have_no_pictures(tmp_path):
    for kl_coef in (0.1, 1.0):
        write_run(tmp_path / f"s/{kl_coef}", config(kl_coef=kl_coef), [], status="failed")
    names, payload = draw(tmp_path, tmp_path / "s")
    assert (names, payload["parameters"]) == ([], ["stage.kl_coef"])


def test_a_figure_that_cannot_be_drawn_is_left_out(tmp_path, monkeypatch, caplog):
    save = Figure.savefig

    def fail(figure, path, **options):
        if path.name == "curves.png":
            raise RuntimeError("no font")
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", fail)
    write_sweep(tmp_path / "s", {"kl_coef": [0.1, 1.0], "seed": [1, 2]})
    names, _ = draw(tmp_path, tmp_path / "s")
    assert names == ["frontier.png", "costs.png", "parameters.png"]
    assert caplog.messages == [
        "curves.png failed (RuntimeError: no font); the report goes on without it"
    ]


def test_the_true_reward_has_a_frontier_of_its_own(tmp_path, drawn):
    names, payload = draw(tmp_path, write_stages(tmp_path / "s", seeds=(1, 2)))
    assert names[:2] == ["frontier.png", "true_reward.png"]
    (axis,) = drawn["true_reward.png"].axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == (
        "eval/kl_sum (nats a completion)",
        "eval/true_reward",
    )
    [best] = [line for line in axis.lines if line.get_marker() == "."]
    assert best.get_ydata().tolist() == [0.52, 0.69, 0.82, 0.87]
    ends = [line for line in axis.lines if line.get_marker() == "o"]
    means = [g["true_reward"]["score"]["mean"] for g in payload["groups"] if g["kl"]["mean"]]
    assert [line.get_ydata()[0] for line in ends] == means
    (front,) = [line for line in axis.lines if line.get_label() == "Pareto front"]
    assert front.get_xydata().tolist() == [[1.2, 0.87]]
    assert axis.get_title("left").startswith("true reward against KL")
    (start,) = [line for line in axis.lines if line.get_marker() == "D"]
    assert start.get_xydata().tolist() == [[0.0, 0.52]]


def test_costs_are_drawn_for_settings_that_know_them(tmp_path, drawn):
    _, payload = draw(tmp_path, write_stages(tmp_path / "s", seeds=(1, 2)))
    tokens, seconds = drawn["costs.png"].axes
    sampling = [group for group in payload["groups"] if group["label"].startswith("stage=ppo")]
    for axis, cost in ((tokens, "tokens"), (seconds, "seconds")):
        curves = [group["curves"]["eval"] for group in sampling]
        assert [line.get_xdata().tolist() for line in axis.lines] == [c[cost] for c in curves]
        scores = [c["eval/score"]["mean"] for c in curves]
        assert [line.get_ydata().tolist() for line in axis.lines] == scores
        assert axis.get_xlabel().startswith(cost)

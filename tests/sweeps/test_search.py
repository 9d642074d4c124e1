"""A search goes on where it was cut, learns from what runs leave behind, and knows its best."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_exp.settings import ConfigError
from rlhf_exp.sweeps.search import (
    STUDY,
    Interval,
    Search,
    Trial,
    check_space,
    edge_settings,
    read_metrics,
)

LOSS = {"loss": "minimize"}
FRONT = {"eval/score": "maximize", "eval/kl": "minimize"}
SPACE = {
    "stage.kl_coef": Interval(low=0.03, high=3.0, log=True, integer=False),
    "stage.clip_coef": Interval(low=0.1, high=0.3, log=False, integer=False),
    "sampler.gen_len": Interval(low=4, high=8, log=False, integer=True),
    "reward": ("keyword", "length", "'a b'"),
}


def search(folder: Path, *, metrics=LOSS, sampler="random", seed=0) -> Search:
    return Search(folder, sampler=sampler, seed=seed, metrics=metrics)


def finish(folder: Path, **metrics: float) -> Path:
    """The folder of a run that is done, with the metrics of its last evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"after": {k.replace("__", "/"): v for k, v in metrics.items()}})
    (folder / "result.json").write_text(content, encoding="utf-8")
    return folder


def objective(trial: Trial) -> float:
    return (float(trial.values["stage.clip_coef"]) - 0.2) ** 2


def test_draws_are_words_of_a_command_line_within_their_intervals(tmp_path):
    one = search(tmp_path)
    trials = [one.ask(SPACE) for _ in range(40)]
    assert [trial.number for trial in trials] == [*range(40)]
    assert all(trial.values.keys() == SPACE.keys() for trial in trials)
    kl_coefs = [float(trial.values["stage.kl_coef"]) for trial in trials]
    assert all(0.03 <= value <= 3 for value in kl_coefs)
    below = sum(value < 0.3 for value in kl_coefs)  # half of a log scale, a tenth of a linear one
    assert 10 <= below <= 30
    assert all(0.1 <= float(trial.values["stage.clip_coef"]) <= 0.3 for trial in trials)
    assert {trial.values["sampler.gen_len"] for trial in trials} == {"4", "5", "6", "7", "8"}
    assert {trial.values["reward"] for trial in trials} == {*SPACE["reward"]}


def test_a_seed_draws_the_same_and_another_one_something_else(tmp_path):
    draws = [search(tmp_path / f"{i}", seed=seed).ask(SPACE) for i, seed in enumerate((3, 3, 4))]
    assert draws[0] == draws[1]
    assert draws[0].values != draws[2].values


def test_a_search_goes_on_with_other_draws_than_before(tmp_path):
    first = search(tmp_path)
    old = []
    for _ in range(3):
        trial = first.ask(SPACE)
        first.tell(trial, finish(tmp_path / "run", loss=objective(trial)))
        old.append(trial.values)
    assert first.num_done == 3
    second = search(tmp_path)
    assert second.num_done == 3, "results are kept"
    trial = second.ask(SPACE)
    assert trial.number == 3
    assert trial.values not in old


def test_what_was_cut_or_failed_is_drawn_again_first_with_the_same_values(tmp_path):
    first = search(tmp_path)
    done, failed, running = (first.ask(SPACE) for _ in range(3))
    first.tell(done, finish(tmp_path / "run", loss=1.0))
    first.tell(failed, None)
    assert first.num_done == 1
    second = search(tmp_path)
    again = [second.ask(SPACE) for _ in range(3)]
    assert [trial.values for trial in again[:2]] == [failed.values, running.values]
    assert again[2].values not in (done.values, failed.values, running.values)
    for trial in again:
        second.tell(trial, finish(tmp_path / "run", loss=2.0))
    assert second.num_done == 4
    fresh = search(tmp_path).ask(SPACE)
    assert fresh.values not in [done.values, *(trial.values for trial in again)]


def test_what_failed_within_a_search_is_not_drawn_again_by_it(tmp_path):
    one = search(tmp_path)
    failed = one.ask(SPACE)
    one.tell(failed, None)
    assert one.ask(SPACE).values != failed.values
    assert one.num_done == 0


def test_what_failed_often_is_drawn_again_once(tmp_path):
    first = search(tmp_path)
    failed = first.ask(SPACE)
    first.tell(failed, None)
    for _ in range(2):
        again = search(tmp_path)
        trial = again.ask(SPACE)
        assert trial.values == failed.values
        again.tell(trial, None)
        other = again.ask(SPACE)
        assert other.values != failed.values
        again.tell(other, finish(tmp_path / "run", loss=1.0))


def test_a_search_that_is_cut_before_it_draws_queues_nothing_twice(tmp_path):
    search(tmp_path).ask(SPACE)
    for _ in range(3):
        cut = search(tmp_path)
    old = cut.ask(SPACE)
    assert cut.ask(SPACE).values != old.values


def test_it_goes_on_after_its_process_was_killed(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.sweeps.test_search import LOSS, SPACE, Search, finish\n"
        "folder = Path(sys.argv[1])\n"
        "one = Search(folder, sampler='random', seed=0, metrics=LOSS)\n"
        "for loss in (3.0, 2.0):\n"
        "    one.tell(one.ask(SPACE), finish(folder / 'run', loss=loss))\n"
        "print(one.ask(SPACE).values['stage.kl_coef'], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert killed.returncode == -9, killed.stderr
    again = search(tmp_path)
    assert again.num_done == 2
    assert again.best()[0][1] == [2.0]
    assert again.ask(SPACE).values["stage.kl_coef"] == killed.stdout.strip()


def test_it_goes_on_with_a_study_that_was_cut_anywhere_in_its_last_lines(tmp_path):
    whole = search(tmp_path / "whole")
    for loss in (3.0, 2.0):
        whole.tell(whole.ask(SPACE), finish(tmp_path / "run", loss=loss))
    content = (tmp_path / "whole" / STUDY).read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    sizes = {len(content) - cut: 1 for cut in (1, 2, last // 2, last - 1, last, last + 1)}
    for size, num_done in (sizes | {1: 0, 0: 0}).items():
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / STUDY).write_bytes(content[:size])
        again = search(folder)
        assert again.num_done == num_done
        again.tell(again.ask(SPACE), finish(tmp_path / "run", loss=1.0))
        assert search(folder).best()[0][1] == [1.0]


def test_a_study_that_is_damaged_within_is_refused_by_name(tmp_path):
    one = search(tmp_path)
    one.tell(one.ask(SPACE), finish(tmp_path / "run", loss=1.0))
    lines = (tmp_path / STUDY).read_bytes().splitlines(keepends=True)
    for damaged in (lines[1][:9] + lines[2], b"[]\n", b"{}\n", b"\xff\n"):
        content = b"".join([*lines[:1], damaged, *lines[2:]])
        (tmp_path / STUDY).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"^{tmp_path / STUDY} is damaged .*: remove it to"):
            search(tmp_path)
        assert (tmp_path / STUDY).read_bytes() == content


@pytest.mark.parametrize(("direction", "best"), [("minimize", 1.0), ("maximize", 3.0)])
def test_the_best_of_one_metric(tmp_path, direction, best):
    one = search(tmp_path, metrics={"loss": direction})
    told = {}
    for loss in (2.0, 1.0, 3.0):
        trial = one.ask(SPACE)
        one.tell(trial, finish(tmp_path / "run", loss=loss, other=9.0))
        told[loss] = trial.values
    one.tell(one.ask(SPACE), None)
    [(params, metrics)] = one.best()
    assert metrics == [best]
    assert {key: str(value) for key, value in params.items()} == told[best]


def test_the_best_of_several_metrics_are_those_that_none_is_better_than(tmp_path):
    one = search(tmp_path, metrics=FRONT)
    for score, kl in ((0.9, 1.0), (0.5, 0.1), (0.5, 0.2), (0.8, 1.0)):
        one.tell(one.ask(SPACE), finish(tmp_path / "run", eval__score=score, eval__kl=kl))
    assert sorted(metrics for _, metrics in one.best()) == [[0.5, 0.1], [0.9, 1.0]]


def test_without_results_there_is_no_best(tmp_path):
    one = search(tmp_path, metrics=FRONT)
    one.tell(one.ask(SPACE), None)
    assert one.best() == []


def test_tpe_learns_from_results(tmp_path):
    one = search(tmp_path, sampler="tpe")
    space = {"stage.clip_coef": SPACE["stage.clip_coef"]}
    distances = []
    for _ in range(40):
        trial = one.ask(space)
        one.tell(trial, finish(tmp_path / "run", loss=objective(trial)))
        distances.append(abs(float(trial.values["stage.clip_coef"]) - 0.2))
    # Uniform draws have a mean distance of 0.05; the first ten of TPE are such.
    assert sum(distances[20:]) / 20 < 0.03


@pytest.mark.parametrize("metrics", [{"loss": "maximize"}, {"other": "minimize"}, FRONT])
def test_a_study_of_other_metrics_is_refused(tmp_path, metrics):
    first = search(tmp_path)
    first.tell(first.ask(SPACE), finish(tmp_path / "run", loss=1.0))
    with pytest.raises(ConfigError, match=r"maximize and minimize: .*loss.*hydra\.sweep\.dir"):
        search(tmp_path, metrics=metrics)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "grid"}, r"hydra\.sweeper\.sampler=grid: use tpe or random"),
        ({"metrics": {}}, r"name a metric: hydra\.sweeper\.maximize"),
        (
            {"metrics": {"eval/score": "maximize", "eval/kl": "down"}},
            r"eval/kl: down: maximize or minimize",
        ),
    ],
)
def test_bad_settings_are_refused_by_name_before_anything_is_written(tmp_path, changes, message):
    settings = {"sampler": "tpe", "seed": 0, "metrics": LOSS, **changes}
    with pytest.raises(ConfigError, match=message):
        Search(tmp_path / "sweep", **settings)
    assert not (tmp_path / "sweep").exists()


def test_without_optuna_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs Optuna: pip install 'rlhf_exp\[search\]'"):
        search(tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_metrics_are_those_of_the_last_evaluation_in_order(tmp_path):
    finish(tmp_path, eval__kl=0.1, eval__score=1, loss=2.0)
    assert read_metrics(tmp_path, ["eval/score", "eval/kl"]) == [1.0, 0.1]
    with pytest.raises(
        ConfigError, match=r"hydra\.sweeper: eval/x is no result .* eval/kl, eval/score"
    ):
        read_metrics(tmp_path, ["eval/score", "eval/x"])


def test_a_metric_that_runs_do_not_have_ends_the_search(tmp_path):
    one = search(tmp_path)
    with pytest.raises(ConfigError, match=r"hydra\.sweeper: loss is no result"):
        one.tell(one.ask(SPACE), finish(tmp_path / "run", eval__score=1.0))
    assert one.num_done == 0


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        (Interval(low=1, high=0.1, log=False, integer=False), r"write interval\(0\.1,1\)$"),
        (Interval(low=4, high=1, log=False, integer=True), r"write interval\(1,4\)$"),
        (Interval(low=0.0, high=1.0, log=True, integer=False), r"begins above 0$"),
        (Interval(low=-1, high=3, log=True, integer=True), r"begins above 0$"),
        (Interval(low=0.0, high=math.inf, log=False, integer=False), r"both ends must be finite$"),
        (Interval(low=math.nan, high=1.0, log=False, integer=False), r"both ends must be finite$"),
    ],
)
def test_an_interval_that_cannot_be_drawn_from_is_refused_by_its_key(interval, message):
    with pytest.raises(ConfigError, match=rf"^stage\.kl_coef: .*{message}"):
        check_space({"seed": ("1", "2"), "stage.kl_coef": interval})
    check_space(SPACE)


def test_corners_hold_both_ends_of_every_interval_and_every_choice():
    settings = edge_settings(SPACE)
    assert all(setting.keys() == SPACE.keys() for setting in settings)
    held = {key: {setting[key] for setting in settings} for key in SPACE}
    assert held == {
        "stage.kl_coef": {"0.03", "3.0"},
        "stage.clip_coef": {"0.1", "0.3"},
        "sampler.gen_len": {"4", "8"},
        "reward": {"keyword", "length", "'a b'"},
    }
    assert len(settings) == 1 + 1 + 1 + 1 + 2, "as few as it takes, not every combination"
    assert edge_settings({"a": ("x",)}) == [{"a": "x"}]


def test_ends_of_an_interval_of_integers_are_integers_however_they_were_given():
    ends = Interval(low=1.0, high=4.0, log=False, integer=True)
    assert [setting["n"] for setting in edge_settings({"n": ends})] == ["1", "4"]


def test_a_trial_whose_metric_was_not_finite_has_failed(tmp_path):
    one = search(tmp_path)
    for loss in (None, float("inf"), float("nan")):
        one.tell(one.ask(SPACE), finish(tmp_path / "run", loss=loss))
    assert one.num_done == 0
    one.tell(one.ask(SPACE), finish(tmp_path / "run", loss=1.0))
    assert one.num_done == 1

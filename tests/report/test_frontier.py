import pytest

from rlhf_exp.report.frontier import before_training, default_kl, iqm
from rlhf_exp.runs.reading import read_run
from tests.report.build_runs import best_of_n_config, best_of_n_rows, config, write_run


@pytest.fixture
def make(tmp_path):
    def make_run(seed, start, *, kl=0.0):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        lines = [{"phase": 0, "eval/score": start, "eval/kl": kl}] if start is not None else []
        lines.append({"phase": 4, "eval/score": float(seed), "eval/kl": 0.5})
        return read_run(write_run(folder, config(seed=seed), lines))

    return make_run


def before(*groups):
    return before_training(groups, "eval/score", "eval/kl")


def test_the_model_before_training_is_the_mean_over_seeds(make):
    found = before([make(1, 0.5), make(2, 0.7)], [make(2, 0.7), make(3, 0.9)], [make(1, None)], [])
    assert found["score"]["mean"] == 0.7
    assert found["score"]["low"] == pytest.approx(0.7 - 4.302653 * 0.2 / 3**0.5, rel=1e-3)
    assert found["kl"]["mean"] == 0.0


def test_groups_that_begin_from_different_models_have_no_point_before_training(make):
    assert before([make(1, 0.5)], [make(1, 0.6)]) is None
    assert before([make(1, 0.5)], [make(2, 0.5)]) is None, "no seed says that the model is the same"
    assert before([make(1, None)], []) is None


def test_the_kl_is_of_completions_if_there_is_a_best_of_n(make, tmp_path):
    trained = make(1, 0.5)
    best = read_run(write_run(tmp_path / "best", best_of_n_config(), best_of_n_rows()))
    assert default_kl([trained]) == "eval/kl"
    assert default_kl([trained, best]) == "eval/kl_sum"


def test_five_runs_have_an_interquartile_mean(make):
    runs = [make(seed, 0.5) for seed in (1, 2, 3, 4, 90)]
    assert iqm(runs, "eval/score")["mean"] == 3.0
    assert iqm(runs[:4], "eval/score") is None

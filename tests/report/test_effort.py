import numpy as np

from rlhf_exp.report.effort import at_phases, spent_by_phase
from rlhf_exp.runs.reading import read_run
from tests.report.build_runs import (
    best_of_n_config,
    best_of_n_rows,
    config,
    dpo_config,
    dpo_rows,
    supervised_rows,
    write_run,
)


def row(phase, *, length, rollout, learn):
    times = {"time/rollout_s": rollout, "time/learn_s": learn, "time/sample_s": 100.0}
    return {"phase": phase, "sample/len_mean": length, **times}


def spent(folder, settings, metrics):
    return spent_by_phase(read_run(write_run(folder, settings, metrics)))


def test_costs_add_up_over_the_phases(tmp_path):
    metrics = [
        {"phase": 0, "eval/score": 0.5, "eval/kl": 0.0},
        row(1, length=10.0, rollout=1.0, learn=2.0),
        row(2, length=4.5, rollout=0.5, learn=0.25),
    ]
    costs = spent(tmp_path / "run", config(), metrics)  # 64 completions a phase
    assert costs["completions"].tolist() == [0, 64, 128]
    assert costs["tokens"].tolist() == [0, 640, 928]
    assert costs["seconds"].tolist() == [0, 3, 3.75]
    np.testing.assert_array_equal(at_phases(costs["tokens"], [2, 0, 3]), [928, 0, np.nan])


def test_after_a_phase_without_numbers_the_costs_are_unknown(tmp_path):
    metrics = [row(1, length=10.0, rollout=1.0, learn=2.0), row(3, length=4.5, rollout=1, learn=1)]
    for cost in spent(tmp_path / "run", config(), metrics).values():
        assert np.isnan(cost).tolist() == [False, False, True, True]


def test_runs_that_do_not_sample_in_each_phase_have_no_costs(tmp_path):
    assert spent(tmp_path / "dpo", dpo_config(), dpo_rows()) == {}
    assert spent(tmp_path / "best", best_of_n_config(), best_of_n_rows()) == {}
    assert spent(tmp_path / "sft", config(), supervised_rows()) == {}
    assert spent(tmp_path / "x", None, [row(1, length=1.0, rollout=1, learn=1)]) == {}

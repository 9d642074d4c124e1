import pytest

from rlhf_exp.report.diagnosis import diagnose
from rlhf_exp.runs.reading import read_runs
from tests.report.build_runs import config, rows, supervised_rows, write_run


@pytest.fixture
def warnings_of(tmp_path):
    def warn(lines):
        ((run,), _) = read_runs([write_run(tmp_path / "run", config(), lines)])
        return diagnose(run)

    return warn


def changed(**curves):
    """A healthy run of 40 phases in which metrics follow functions of the phase."""
    lines = rows(config(), phases=40)
    for name, value in curves.items():
        for row in lines:
            if (metric := name.replace("__", "/")) in row:
                row[metric] = value(row["phase"])
    return lines


def test_a_healthy_run_has_no_warning(warnings_of):
    assert warnings_of(changed()) == []


def test_a_run_without_rows_or_with_one_has_none(warnings_of):
    assert warnings_of(rows(config(), phases=1)[:2]) == []


ILL = [
    (
        {"eval__distinct_3": lambda phase: 0.44 - 0.01 * phase},
        "eval/distinct_3 fell from 0.44 to 0.04",
        "stage.kl_coef",
    ),
    (
        {"objective__entropy": lambda phase: 1.2 * 0.85**phase},
        "entropy near 0: 1.02 at first, 0.0023 nats a token",
        "stage.ent_coef",
    ),
    (
        {"objective__scores": lambda phase: 0.5, "objective__kl": lambda phase: 0.01 * phase},
        "KL rises with no reward: from phase 1 on KL went 0.025 -> 0.385 nats a token, the score"
        " 0.5 -> 0.5",
        "stage.kl_coef",
    ),
    (
        # Rises to the middle, then only the KL goes on.
        {
            "objective__scores": lambda phase: min(0.8, 0.04 * phase),
            "objective__kl": lambda phase: 0.02 * phase,
        },
        "KL rises with no reward: from the middle on KL went 0.45 -> 0.77",
        "stop earlier",
    ),
    (
        {"val__explained_variance": lambda phase: 0.4 if phase < 20 else -0.5},
        "value explained variance -0.5 over the last quarter",
        "optimizer.head_lr",
    ),
    (
        {"policy__clipfrac": lambda phase: 0.1 if phase < 31 else 0.55},
        "clip fraction above 0.4 in 10 of 40 phases (at most 0.55, first at phase 31)",
        "optimizer.base_lr",
    ),
    (
        {"loss__total": lambda phase: None if phase > 30 else 0.1},
        "loss/total is not finite at phase 31 (10 phases in all)",
        "fp32",
    ),
]


@pytest.mark.parametrize(
    ("curves", "numbers", "advice"), ILL, ids=[numbers for _, numbers, _ in ILL]
)
def test_each_illness_is_named_with_its_numbers_and_what_to_try(
    warnings_of, curves, numbers, advice
):
    (warning,) = warnings_of(changed(**curves))
    assert numbers in warning
    assert advice in warning


@pytest.mark.parametrize(
    "curves",
    [
        {"eval__distinct_3": lambda phase: 0.44 - 0.005 * phase},
        {"objective__entropy": lambda phase: 0.15},
        {"objective__entropy": lambda phase: 0.05},  # from the beginning on: no collapse
        {"objective__kl": lambda phase: 0.01 * phase},
        {"objective__scores": lambda phase: 0.5, "objective__kl": lambda phase: 0.0002 * phase},
        {"val__explained_variance": lambda phase: -0.5 if phase < 20 else 0.4},
        {"policy__clipfrac": lambda phase: 0.39},
        {"policy__clipfrac": lambda phase: 0.9 if phase < 3 else 0.1},
    ],
)
def test_what_is_near_an_illness_is_none(warnings_of, curves):
    assert warnings_of(changed(**curves)) == []


def test_a_supervised_run_that_overfits(warnings_of):
    losses = [(2, 3.0), (4, 2.0), (6, 2.5)]
    extra = [{"phase": phase, "heldout/loss": loss} for phase, loss in losses]
    assert warnings_of([*supervised_rows(updates=1)[:1], *extra]) == [
        "held-out loss rose from 2 (phase 4) to 2.5: overfitting; train for fewer epochs, on more"
        " data, or with a lower optimizer.base_lr"
    ]


def test_what_was_skipped_is_told_in_place_of_its_nulls(warnings_of):
    lines = changed()
    for row in lines:
        if "objective/scores" in row:
            row["train/skipped_steps"] = 0.0
            row["train/skipped_rewards"] = float(row["phase"] >= 7)
            if row["phase"] == 7:
                row["objective/scores"] = row["loss/total"] = None
    [warning] = warnings_of(lines)
    assert warning.startswith("0 steps that were not finite and 1 phases without")
    assert "train.log" in warning

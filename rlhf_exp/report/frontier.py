"""The groups' places on a frontier: their ends, their paths, and the point before training.

It knows runs and metrics, not pictures.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_exp.report.statistics import (
    Estimate,
    interquartile_mean,
    mean_interval,
    pareto_front,
    rounded,
)
from rlhf_exp.runs.config_keys import BEST_OF_N
from rlhf_exp.runs.reading import Run

TRUE_REWARD = "eval/true_reward"
KL_OF_COMPLETIONS = "eval/kl_sum"
EFFICIENCY = "eval/kl_efficiency"
EQUAL = 1e-3  # relative, for evaluations of one model before training


def default_kl(runs: Sequence[Run]) -> str:
    """The KL of completions if some runs are of the best of n or know their limit, which have no KL
    of their own for each token; else the KL per token."""
    of_completions = any(is_best_of_n(run) or run.limit is not None for run in runs)
    return KL_OF_COMPLETIONS if of_completions else "eval/kl"


def is_best_of_n(run: Run) -> bool:
    """True if the run's phases are values of n."""
    return run.config.get("stage._target_") == BEST_OF_N


def place_groups(groups: Sequence[Sequence[Run]], score: str, kl: str) -> list[dict[str, Any]]:
    """For each group of runs the mean of the score with its interval, the path over the phases, and
    whether its end is on the Pareto front."""
    places: list[dict[str, Any]] = [
        {"score": interval(runs, score), "path": _path(runs, score, kl)} for runs in groups
    ]
    ends = [
        (interval(runs, kl)["mean"], place["score"]["mean"])
        for runs, place in zip(groups, places, strict=True)
    ]
    front = pareto_front(ends)
    return [{**place, "pareto": on} for place, on in zip(places, front, strict=True)]


def interval(runs: Sequence[Run], metric: str) -> dict[str, float | None]:
    """The mean of the runs' last values and its t-interval."""
    return mean_of([value for run in runs if (value := run.final(metric)) is not None])


def mean_of(values: Sequence[float]) -> dict[str, float | None]:
    """The mean of the values and its t-interval."""
    columns = mean_interval(np.array(values, dtype=float).reshape(-1, 1))
    return Estimate(*(float(column[0]) for column in columns)).rounded()


def before_training(
    groups: Sequence[Sequence[Run]], score: str, kl: str
) -> dict[str, dict[str, float | None]] | None:
    """Score and KL of the model that all groups begin from, by their evaluations at phase 0: means
    over the seeds. None if there is no such evaluation, if two runs with the same seed differ, or
    if the groups share no seed, so that nothing says that they begin from the same model."""
    starts = [start for runs in groups if (start := _starts(runs, score, kl))]
    if not starts or not set.intersection(*(set(start) for start in starts)):
        return None
    points: dict[int, tuple[float, float]] = {}
    for seed, point in (item for start in starts for item in start.items()):
        if not math.isclose(points.setdefault(seed, point)[0], point[0], rel_tol=EQUAL):
            return None
    scores, kls = zip(*points.values(), strict=True)
    return {"score": mean_of(scores), "kl": mean_of(kls)}


def _starts(runs: Sequence[Run], score: str, kl: str) -> dict[int, tuple[float, float]]:
    """Score and KL at phase 0 by seed."""
    starts = {}
    for run in runs:
        point = tuple(dict(run.curves(name).points(name)).get(0) for name in (score, kl))
        if run.seed is not None and point[0] is not None and point[1] is not None:
            starts[run.seed] = point[0], point[1]
    return starts


def iqm(runs: Sequence[Run], metric: str) -> dict[str, float | None] | None:
    """The interquartile mean of the runs' last values and its bootstrap interval; None for too few
    runs."""
    values = [value for run in runs if (value := run.final(metric)) is not None]
    estimate = interquartile_mean(np.array(values, dtype=float))
    if math.isnan(estimate.mean):
        return None
    return estimate.rounded()


def _path(runs: Sequence[Run], score: str, kl: str) -> list[dict[str, Any]]:
    """The means of both metrics at each phase for which all runs of the group have them, and of the
    efficiency if all have it too."""
    if not runs:
        return []
    metrics = {"score": score, "kl": kl, "efficiency": EFFICIENCY}
    columns = {
        name: [dict(run.curves(metric).points(metric)) for run in runs]
        for name, metric in metrics.items()
    }
    phases = set.intersection(*({*values} for n in ("score", "kl") for values in columns[n]))
    return [
        {
            "phase": phase,
            **{
                name: rounded(float(np.mean([values[phase] for values in column])))
                for name, column in columns.items()
                if all(phase in values for values in column)
            },
        }
        for phase in sorted(phases)
    ]

"""The limit of score against KL as lines of a frontier, and the efficiency of runs beside it.

It knows the points that runs kept, not how they follow from scores.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_exp.report.frontier import EFFICIENCY, KL_OF_COMPLETIONS, TRUE_REWARD, mean_of
from rlhf_exp.report.grouping import label_of, settings_of
from rlhf_exp.report.statistics import rounded
from rlhf_exp.runs.limit_file import Point
from rlhf_exp.runs.reading import Run

SCORE = "eval/score"
# The keys that decide what the reference samples and how it is scored.
OF_REFERENCE = re.compile(
    r"(task|reward|model|intervention|prepare)\b|sampler\.(gen_len|stop_at_eos)$"
)
POINTS = 50  # of a line


def limit_lines(
    groups: Sequence[Sequence[Run]], parameters: Sequence[str], score: str, kl: str
) -> list[dict[str, Any]]:
    """A line for each reward, task and model whose runs know their limit: the mean over their
    different samples, at equal KL, as far as all of these reach. Empty unless `score` is the score
    or the true reward and `kl` that of completions, the only numbers that have a limit."""
    if kl != KL_OF_COMPLETIONS or score not in (SCORE, TRUE_REWARD):
        return []
    lines: dict[str, dict[tuple[Point, ...], Run]] = {}
    for run in (run for runs in groups for run in runs):
        limit = run.limit
        points = limit and (limit.frontier if score == SCORE else limit.true_frontier)
        if points and len(points) > 1:
            config = {key: value for key, value in run.config.items() if OF_REFERENCE.match(key)}
            lines.setdefault(repr(config), {}).setdefault(tuple(points), run)
    names = [name for name in parameters if OF_REFERENCE.match(name)]
    return [
        {
            "label": label_of(settings_of(next(iter(samples.values())), names)),
            "samples": len(samples),
            "points": _mean_line([*samples]),
        }
        for samples in lines.values()
    ]


@np.errstate(over="ignore", invalid="ignore")
def _mean_line(lines: Sequence[Sequence[Point]]) -> list[dict[str, float | None]]:
    """The mean of the lines at equal KL. The points are at equal distances of the root of the KL,
    of which the score is a nearly linear function at first."""
    tables = [np.array(sorted(line, key=lambda point: point[1])) for line in lines]
    most = max(0.0, min(table[-1, 1] for table in tables))
    kls = np.linspace(0, math.sqrt(most), POINTS) ** 2
    scores, samples = (
        np.mean([np.interp(kls, table[:, 1], table[:, at]) for table in tables], axis=0)
        for at in (0, 2)
    )
    columns = (kls.tolist(), scores.tolist(), samples.tolist())
    return [
        {"kl": rounded(kl), "score": rounded(score), "samples": rounded(effective)}
        for kl, score, effective in zip(*columns, strict=True)
        if math.isfinite(kl + score + effective)
    ]


def efficiency(run: Run) -> float | None:
    """The efficiency at the run's last evaluation, None if the samples do not tell it."""
    points = run.evaluated.points(EFFICIENCY)
    is_last = points and 0 < points[-1][0] == run.evaluated.phases[-1]
    return points[-1][1] if is_last else None


def mean_efficiency(runs: Sequence[Run]) -> dict[str, float | None] | None:
    """The mean of the runs' efficiencies and its t-interval; None if no run knows its own."""
    values = [value for run in runs if (value := efficiency(run)) is not None]
    return mean_of(values) if values else None

"""The curves of runs and of groups as lists of numbers by phase, thinned to a page's size.

It knows metrics by name only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_exp.report.effort import COSTS, at_phases, spent_by_phase
from rlhf_exp.report.grouping import Group
from rlhf_exp.report.statistics import mean_interval, rounded
from rlhf_exp.runs.reading import Curves, Run

MAX_NUMBERS = 1_000_000  # in curves: 7 MB of JSON beside Plotly's 5 in a page of 15


def choose_curves(
    runs: Sequence[Run], groups: Sequence[Group], problems: list[str]
) -> tuple[dict[str, list[str]], set[int] | None]:
    """The metrics to draw as curves, and the phases to which training curves are thinned (None:
    all) to keep a page of many runs small."""
    train = list(dict.fromkeys(name for run in runs for name in run.train.values))
    evaluated = list(dict.fromkeys(name for run in runs for name in run.evaluated.values))
    metrics = {"train": train, "eval": evaluated}
    copies = len(runs) + 3 * len(groups)
    longest = max((len(run.train.phases) for run in runs), default=0)
    stride = math.ceil(len(train) * longest * copies / MAX_NUMBERS)
    if stride <= 1:
        return metrics, None
    problems.append(f"curves: one phase in {stride}, to keep the report small")
    phases = sorted({phase for run in runs for phase in run.train.phases})
    return metrics, {*phases[::stride], *(run.train.phases[-1] for run in runs if run.train.phases)}


def run_curves(
    run: Run, metrics: Mapping[str, Sequence[str]], thinned: set[int] | None
) -> dict[str, Any]:
    """The run's metrics at the phases of training and of evaluations, and its costs there."""
    curves = {}
    for side, source in (("train", run.train), ("eval", run.evaluated)):
        phases = _thinned_phases(source.phases, thinned if side == "train" else None)
        table = _table([source], phases, [n for n in metrics[side] if n in source.values])
        columns = {name: _rounded_all(values[0]) for name, values in table.items()}
        curves[side] = {"phase": phases, **_costs([run], phases), **columns}
    return curves


def _thinned_phases(phases: Iterable[int], thinned: set[int] | None) -> list[int]:
    return sorted(p for p in set(phases) if thinned is None or p in thinned)


def _table(
    sources: Sequence[Curves], phases: Sequence[int], metrics: Sequence[str]
) -> dict[str, np.ndarray]:
    """An array for each metric, with a row per run and a column per phase; NaN for no value."""
    tables = {name: np.full((len(sources), len(phases)), math.nan) for name in metrics}
    for row, source in enumerate(sources):
        _, columns, places = np.intersect1d(phases, source.phases, return_indices=True)
        for name in source.values.keys() & tables.keys():
            tables[name][row, columns] = source.values[name][places]
    return tables


def group_curves(
    runs: Sequence[Run], metrics: Mapping[str, Sequence[str]], thinned: set[int] | None
) -> dict[str, Any]:
    """As `run_curves`, with the mean over the runs and its interval for each metric."""
    curves = {}
    for side in ("train", "eval"):
        sources = [run.train if side == "train" else run.evaluated for run in runs]
        all_phases = (phase for source in sources for phase in source.phases)
        phases = _thinned_phases(all_phases, thinned if side == "train" else None)
        names = [n for n in metrics[side] if any(n in source.values for source in sources)]
        columns: dict[str, Any] = {"phase": phases, **_costs(runs, phases)}
        if names:
            tables = _table(sources, phases, names)
            interval = mean_interval(np.hstack([tables[name] for name in names]))
            ends = {end: np.split(a, len(names)) for end, a in interval._asdict().items()}
            for i, name in enumerate(names):
                columns[name] = {end: _rounded_all(parts[i]) for end, parts in ends.items()}
        curves[side] = columns
    return curves


def _costs(runs: Sequence[Run], phases: Sequence[int]) -> dict[str, list[float | None]]:
    """For each cost what the runs have spent by each phase, the mean over those that know it. Costs
    that a run does not know are left out."""
    spent = [spent_by_phase(run) for run in runs]
    columns = {}
    for cost in COSTS:
        found = [at_phases(of_run[cost], phases) for of_run in spent if cost in of_run]
        if len(found) == len(runs) > 0:
            columns[cost] = _rounded_all(mean_interval(np.array(found)).mean)
    return {cost: column for cost, column in columns.items() if any(column)}


def _rounded_all(values: np.ndarray) -> list[float | None]:
    return [rounded(value) for value in values.tolist()]

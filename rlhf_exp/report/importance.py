"""The share of the scores' variance that each parameter and each pair of parameters explains.

Grids are analyzed by analysis of variance, other searches by a random forest. If the runs are too
few to separate an effect from the noise between seeds, a note says so and no number is given.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_exp.report.grouping import sortable

MIN_FILLED = 0.8  # fraction of the grid's cells; below it the effects are not separable
MIN_NOISE_DF = 2
MIN_FOREST_RUNS = 12
LEVELS, BACKGROUND = 8, 128
MAX_PAIRED = 10  # parameters whose pairs are computed
INSTALL = "pip install 'rlhf_exp[judge]'"


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Shares of the scores' variance, largest first, the share of noise, and a note on how they
    were computed or why not. Shares need not sum to 1: interactions of three or more parameters
    are left out."""

    note: str
    parameters: list[tuple[str, float]] = field(default_factory=list)
    pairs: list[tuple[str, str, float]] = field(default_factory=list)
    noise: float | None = None


def measure_importance(
    settings: Sequence[Mapping[str, Any]], scores: Sequence[float], parameters: Sequence[str]
) -> Importance:
    """The importances of the parameters, from one row of settings and one score per run."""
    columns = {name: _codes([row.get(name) for row in settings]) for name in parameters}
    columns = {name: codes for name, codes in columns.items() if len(set(codes)) > 1}
    columns, copies = _without_copies(columns)
    reason = _too_few(columns, scores)
    if reason:
        return Importance(note=reason)
    target = np.asarray(scores, dtype=float)
    cells = len(set(zip(*columns.values(), strict=True)))
    full = cells >= MIN_FILLED * math.prod(len(set(codes)) for codes in columns.values())
    importance = _decompose_grid(columns, target) if full else _decompose_forest(columns, target)
    moving = "".join(f" {copy} changes only together with {first}." for copy, first in copies)
    return Importance(
        parameters=sorted(importance.parameters, key=lambda entry: -entry[1]),
        pairs=sorted(importance.pairs, key=lambda entry: -entry[2]),
        noise=importance.noise,
        note=importance.note + moving,
    )


def _codes(values: Sequence[Any]) -> list[float]:
    """The values if they are numbers, else their ranks in sorted order."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return [float(value) for value in values]
    keys = [sortable(value) for value in values]
    ranks = {key: float(rank) for rank, key in enumerate(sorted(set(keys)))}
    return [ranks[key] for key in keys]


def _without_copies(
    columns: Mapping[str, list[float]],
) -> tuple[dict[str, list[float]], list[tuple[str, str]]]:
    """The columns that copy no earlier one, and (copy, original) for the others."""
    firsts: dict[tuple[int, ...], str] = {}
    copies = []
    for name, codes in columns.items():
        partition = [codes.index(code) for code in codes]
        if len(set(codes)) == len(codes):  # as in a random search: compare the order
            partition = np.argsort(np.asarray(codes)).tolist()
        first = firsts.setdefault(tuple(partition), name)
        if first != name:
            copies.append((name, first))
    return {name: columns[name] for name in firsts.values()}, copies


def _too_few(columns: Mapping[str, Sequence[float]], scores: Sequence[float]) -> str | None:
    if not columns:
        return "no importances: the finished runs differ in no parameter"
    if len(scores) < 4:
        return f"no importances: {len(scores)} finished runs are too few; 4 are needed"
    if np.ptp(np.asarray(scores, dtype=float)) < 1e-12:
        return "no importances: all runs end with the same score"
    return None


def _decompose_grid(columns: Mapping[str, Sequence[float]], target: np.ndarray) -> Importance:
    """Analysis of variance by least squares on the runs: each effect's share is epsilon squared,
    (sum of squares - df * mean square of the noise) / total, with mean 0 for a parameter without
    effect (Kelley, An unbiased correlation ratio measure, 1935). The noise is the spread of runs
    with equal parameters, if there are such runs."""
    names = list(columns)
    mains = {name: _indicators(columns[name]) for name in names}
    pairs = {
        (a, b): np.einsum("ri,rj->rij", mains[a], mains[b]).reshape(len(target), -1)
        for a, b in itertools.combinations(names, 2)
    }
    cells = np.unique(np.array(list(columns.values())).T, axis=0, return_inverse=True)[1]
    pure = _fit(target, [_indicators(cells.reshape(-1).astype(float).tolist())])
    fits = {"cells": pure, "pairs": _fit(target, [*mains.values(), *pairs.values()])}
    additive = fits["mains"] = _fit(target, list(mains.values()))
    kind = next((kind for kind in fits if fits[kind][1] >= MIN_NOISE_DF), None)
    if kind is None:
        return Importance(note="no importances: too few runs to tell effects from noise; add seeds")
    square = fits[kind][0] / fits[kind][1]
    total = float(((target - target.mean()) ** 2).sum())

    def share(without: Sequence[np.ndarray], whole: Fit) -> float:
        """An effect's share, from the design without it and the fit with it."""
        rest, df = _fit(target, without)
        return max(0.0, (rest - whole[0] - (df - whole[1]) * square) / total)

    single = [
        (name, share([m for other, m in mains.items() if other != name], additive))
        for name in names
    ]
    both = [] if kind == "mains" else [
        (a, b, share(
            [*mains.values(), *(p for pair, p in pairs.items() if pair != (a, b))], fits["pairs"]
        ))
        for a, b in pairs
    ]  # fmt: skip
    noise = min(1.0, square * (len(target) - 1) / total)
    return Importance(parameters=single, pairs=both, noise=noise, note=_grid_note(kind, noise))


def _grid_note(kind: str, noise: float) -> str:
    source = {
        "cells": "between seeds",
        "pairs": "not explained by any pair of parameters, as no two runs differ only in the seed",
        "mains": "not explained by any single parameter, as no two runs differ only in the seed; it"
        " includes interactions",
    }[kind]
    return (
        "Shares of the variance of the final score over a grid: sums of squares minus the"
        f" expected noise (epsilon squared). Noise ({source}): {noise:.0%}."
    )


Fit = tuple[float, int]  # residual sum of squares, degrees of freedom left


def _fit(target: np.ndarray, blocks: Sequence[np.ndarray]) -> Fit:
    design = np.hstack([np.ones((len(target), 1)), *blocks])
    solution, _, rank, _ = np.linalg.lstsq(design, target, rcond=1e-9)
    return float(((target - design @ solution) ** 2).sum()), len(target) - int(rank)


def _indicators(codes: Sequence[float]) -> np.ndarray:
    """One centered column per level, so that a pair's columns overlap little with the singles."""
    levels = np.unique(np.asarray(codes))
    return (np.asarray(codes)[:, None] == levels).astype(float) - 1 / len(levels)


def _decompose_forest(columns: Mapping[str, Sequence[float]], target: np.ndarray) -> Importance:
    """Functional ANOVA of a random forest (Hutter, Hoos and Leyton-Brown, ICML 2014): the variance
    of its predictions averaged over all other parameters. Unlike the paper, averages are over the
    observed settings, and shares are scaled by the out-of-bag R squared."""
    if len(target) < MIN_FOREST_RUNS:
        few = f"{len(target)} finished runs that are no grid are too few"
        return Importance(note=f"no importances: {few}; {MIN_FOREST_RUNS} are needed")
    try:
        from sklearn.ensemble import RandomForestRegressor
    except ImportError:
        note = f"no importances: the runs are no grid, and a forest needs scikit-learn: {INSTALL}"
        return Importance(note=note)
    table = np.array(list(columns.values())).T
    forest = RandomForestRegressor(200, min_samples_leaf=2, oob_score=True, random_state=0)
    forest.fit(table, target)
    explained = float(forest.oob_score_)
    if explained <= 0:
        note = (
            "no importances: on held-out runs a random forest is no better than the mean"
            f" (R squared {explained:.2f}): the scores are noise, or the runs are too few"
        )
        return Importance(note=note)
    single, both = _marginals(forest.predict, table, list(columns))
    whole = float(np.var(forest.predict(table))) or 1.0
    note = (
        "Shares of the variance of the final score by a random forest's averaged predictions"
        f" (functional ANOVA), scaled by the {explained:.0%} that it explains of held-out runs."
    )
    return Importance(
        parameters=[(name, min(1.0, value / whole) * explained) for name, value in single],
        pairs=[(a, b, min(1.0, value / whole) * explained) for a, b, value in both],
        noise=1 - explained,
        note=note,
    )


def _marginals(
    predict: Callable[[np.ndarray], np.ndarray], table: np.ndarray, names: Sequence[str]
) -> tuple[list[tuple[str, float]], list[tuple[str, str, float]]]:
    """The variance of the averaged predictions for each parameter, and for each pair of parameters
    minus the variances of the two."""
    random = np.random.default_rng(0)
    rows = random.permutation(len(table))[:BACKGROUND]
    levels = [np.quantile(column, (np.arange(LEVELS) + 0.5) / LEVELS, method="nearest")
              for column in table.T]  # fmt: skip

    def averaged(places: Sequence[int]) -> np.ndarray:
        grid = list(itertools.product(*(levels[place] for place in places)))
        points = np.tile(table[rows], (len(grid), 1))
        points[:, list(places)] = np.repeat(np.array(grid), len(rows), axis=0)
        return predict(points).reshape(len(grid), len(rows)).mean(axis=1)

    alone = [float(np.var(averaged([place]))) for place in range(len(names))]
    strongest = sorted(range(len(names)), key=lambda place: -alone[place])[:MAX_PAIRED]
    both = [
        (names[a], names[b], max(0.0, float(np.var(averaged([a, b]))) - alone[a] - alone[b]))
        for a, b in itertools.combinations(sorted(strongest), 2)
    ]
    return list(zip(names, alone, strict=True)), both

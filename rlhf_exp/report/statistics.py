"""Means over seeds with t-intervals, and the Pareto front. It knows arrays, not runs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Means and the ends of their intervals, one entry per column; NaN for unknown."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def mean_interval(table: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """The mean of each column over the rows (seeds) and its Student t-interval:
    mean +- t(n - 1) s / sqrt(n).

    It covers the true mean with probability `confidence` if seeds vary normally, for any number of
    them; it ignores bounds of the quantity. NaN entries are skipped. A column with one number has
    no interval.
    """
    import scipy.stats  # takes a second

    present = ~np.isnan(table)
    counts = present.sum(axis=0).astype(float)
    # A column with too few numbers, or with overflow, gives NaN or infinity.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mean = np.where(present, table, 0.0).sum(axis=0) / counts
        squares = np.where(present, (table - mean) ** 2, 0.0).sum(axis=0)
        errors = np.sqrt(squares / (counts - 1) / counts)
        reach = scipy.stats.t.ppf((1 + confidence) / 2, np.maximum(counts - 1, 1)) * errors
        return Interval(mean=mean, low=mean - reach, high=mean + reach)


def pareto_front(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """True for each (KL, score) on the front: no other point has KL <= its KL and score >= its
    score, one of them strictly. Equal points are both on the front; a point with a None is not."""
    complete = {(kl, score) for kl, score in points if kl is not None and score is not None}
    front = {
        (kl, score)
        for kl, score in complete
        if not any(k <= kl and s >= score for k, s in complete - {(kl, score)})
    }
    return [point in front for point in points]

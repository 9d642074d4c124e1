"""Means over seeds with t-intervals, and the Pareto front. It knows arrays, not runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Means and the ends of their intervals, an entry a point; NaN where unknown."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def mean_interval(table: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """The mean of each column over the rows (seeds) and its Student t-interval:
    mean +- t(n - 1) s / sqrt(n).

    It covers the true mean with probability `confidence` if seeds vary normally, however few they
    are; it does not know that a quantity is bounded. NaN entries are left out of their column. A
    column with one number has no interval.
    """
    import scipy.stats  # takes a second

    known = ~np.isnan(table)
    counts = known.sum(axis=0).astype(float)
    # Where a column has too few numbers, or they overflow, NaN or infinity is the answer.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mean = np.where(known, table, 0.0).sum(axis=0) / counts
        squares = np.where(known, (table - mean) ** 2, 0.0).sum(axis=0)
        errors = np.sqrt(squares / (counts - 1) / counts)
        reach = scipy.stats.t.ppf((1 + confidence) / 2, np.maximum(counts - 1, 1)) * errors
        return Interval(mean=mean, low=mean - reach, high=mean + reach)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each (KL, score) is undominated: none has less or equal KL and more or equal score,
    one of them strictly. Equal points are both on the front; a point with a NaN is not."""
    front = []
    for kl, score in points:
        dominated = any(
            k <= kl and s >= score and (k < kl or s > score)
            for k, s in points
            if not (math.isnan(k) or math.isnan(s))
        )
        front.append(not (dominated or math.isnan(kl) or math.isnan(score)))
    return front

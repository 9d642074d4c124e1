"""Means over seeds with bootstrap intervals, and the Pareto front.

It knows arrays, not runs. scipy.stats.bootstrap gives the same percentile interval (a test compares
them) but draws its resamples anew for each curve, which for a sweep of 200 runs is minutes.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXACT_UP_TO = 6  # so many seeds have 462 different resamples; beyond, they are drawn
DRAWN = 400


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Means and the ends of their intervals, an entry a point; NaN where unknown."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bootstrap_mean(table: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """The mean of each column over the rows (seeds) and its percentile-bootstrap interval.

    NaN entries are left out of their column. A column with one number has no interval. With few
    seeds the interval is too narrow, not too wide: of three it reaches from the lowest to the
    highest. Up to six seeds all resamples are enumerated; of more, 400 are drawn from a fixed seed
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).
    """
    columns = table.shape[1]
    mean, low, high = (np.full(columns, math.nan) for _ in range(3))
    patterns, which = np.unique(~np.isnan(table), axis=1, return_inverse=True)
    for index in range(patterns.shape[1]):
        rows, at = patterns[:, index], np.flatnonzero(which.reshape(-1) == index)
        if not rows.any():
            continue
        known = table[np.ix_(rows, at)]
        mean[at] = known.mean(axis=0)
        if len(known) > 1:
            low[at], high[at] = _percentiles(known, confidence)
    return Interval(mean=mean, low=low, high=high)


def _percentiles(known: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    shares, chances = _resamples(len(known))
    means = shares @ known
    order = np.argsort(means, axis=0)
    ordered = np.take_along_axis(means, order, axis=0)
    below = np.cumsum(chances[order], axis=0)
    tail = (1 - confidence) / 2
    # Of each tail no more than its chance is cut off; the margin is for sums of many thirds.
    low = np.argmax(below > tail + 1e-12, axis=0)
    high = np.argmax(below >= 1 - tail - 1e-12, axis=0)
    points = np.arange(known.shape[1])
    return ordered[low, points], ordered[high, points]


@functools.cache
def _resamples(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Resamples of so many rows as shares of each row, and the chance of each resample."""
    if count > EXACT_UP_TO:
        drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWN)
        return drawn / count, np.full(DRAWN, 1 / DRAWN)
    sets = list(itertools.combinations_with_replacement(range(count), count))
    times = np.array([[chosen.count(row) for row in range(count)] for chosen in sets])
    orders = [math.factorial(count) / math.prod(map(math.factorial, row)) for row in times.tolist()]
    return times / count, np.array(orders) / count**count


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

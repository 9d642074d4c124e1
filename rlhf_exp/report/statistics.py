"""Means over seeds with t-intervals, interquartile means and probabilities of improvement with
bootstrap intervals, and the Pareto front. It knows arrays, not runs."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

MIN_SEEDS = 5  # fewer have neither an interquartile mean nor a bootstrap interval
NUM_RESAMPLES = 5000


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


class Estimate(NamedTuple):
    """A number and the ends of its interval; NaN for unknown."""

    mean: float
    low: float
    high: float

    def rounded(self) -> dict[str, float | None]:
        """The three by name, each with four significant digits; None for unknown."""
        return {end: rounded(number) for end, number in self._asdict().items()}


def interquartile_mean(values: np.ndarray) -> Estimate:
    """The mean of the values without the lowest and the highest quarter, each rounded down to whole
    values, and its 95 % percentile interval by a bootstrap over the values (Agarwal et al. 2021,
    arXiv 2108.13264). NaN values are left out. Fewer than five have no interquartile mean."""
    import scipy.stats

    values = values[~np.isnan(values)]
    if len(values) < MIN_SEEDS:
        return Estimate(np.nan, np.nan, np.nan)

    @np.errstate(over="ignore", invalid="ignore")
    def statistic(values: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(scipy.stats.trim_mean(values, 0.25, axis=axis))

    return Estimate(float(statistic(values)), *_percentiles([values], statistic))


def probability_of_improvement(strata: Sequence[tuple[np.ndarray, np.ndarray]]) -> Estimate:
    """P(X > Y) + P(X = Y) / 2 for a random value of each of two samples: the Mann-Whitney U divided
    by the number of pairs, averaged over the strata (Agarwal et al. 2021, arXiv 2108.13264, section
    4.3), with its 95 % percentile interval by a bootstrap that resamples each sample of each
    stratum on its own. NaN values are left out. There is no interval if a sample has fewer than
    five values, and no number if one has none."""
    samples = [sample[~np.isnan(sample)] for pair in strata for sample in pair]
    fewest = min(map(len, samples), default=0)
    if not fewest:
        return Estimate(np.nan, np.nan, np.nan)

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        assert axis == -1
        wins = [
            (np.sign(x[..., :, None] - y[..., None, :]) + 1).mean(axis=(-2, -1)) / 2
            for x, y in zip(samples[::2], samples[1::2], strict=True)
        ]
        return np.asarray(np.mean(wins, axis=0))

    ends = (np.nan, np.nan) if fewest < MIN_SEEDS else _percentiles(samples, statistic)
    return Estimate(float(statistic(*samples)), *ends)


def _percentiles(
    samples: Sequence[np.ndarray], statistic: Callable[..., np.ndarray]
) -> tuple[float, float]:
    """The 95 % percentile interval of a bootstrap, the same at each call."""
    import scipy.stats

    with np.errstate(invalid="ignore"):  # between infinite means
        ends = scipy.stats.bootstrap(
            samples, statistic, vectorized=True, method="percentile", batch=500,
            n_resamples=NUM_RESAMPLES, rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    return float(ends.low), float(ends.high)


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


def rounded(value: float | None) -> float | None:
    """The number with four significant digits; None if it is unknown or not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")

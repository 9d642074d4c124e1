import math

import numpy as np
import pytest
import scipy.stats

from rlhf_exp.report.statistics import (
    interquartile_mean,
    mean_interval,
    pareto_front,
    probability_of_improvement,
    rounded,
)

NAN = math.nan


def test_three_seeds_by_hand():
    # Of 1, 2 and 6 the mean is 3 and s^2 = (4 + 1 + 9) / 2 = 7; t(.975, 2) = 4.302653.
    interval = mean_interval(np.array([[1.0], [2.0], [6.0]]))
    reach = 4.302653 * math.sqrt(7 / 3)
    assert interval.mean[0] == pytest.approx(3.0, rel=1e-12)
    assert interval.low[0] == pytest.approx(3 - reach, rel=1e-6)
    assert interval.high[0] == pytest.approx(3 + reach, rel=1e-6)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_what_is_called_95_percent_covers_the_mean_95_percent_of_the_time(seeds):
    # Of 20,000 draws the share varies by .0015. The percentile bootstrap covered .75 with 3 seeds,
    # .83 with 5 and .89 with 10.
    interval = mean_interval(np.random.default_rng(1).normal(size=(seeds, 20_000)))
    share = np.mean((interval.low <= 0) & (interval.high >= 0))
    assert 0.945 <= share <= 0.955


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_it_agrees_with_scipy(confidence):
    table = np.random.default_rng(1).normal(size=(6, 30))
    own = mean_interval(table, confidence=confidence)
    theirs = scipy.stats.ttest_1samp(table, 0).confidence_interval(confidence)
    np.testing.assert_allclose(own.low, theirs.low, rtol=1e-10)
    np.testing.assert_allclose(own.high, theirs.high, rtol=1e-10)


def test_unknown_values_are_left_out_of_their_column():
    table = np.array([[1.0, 1.0, NAN, NAN], [3.0, NAN, NAN, 5.0], [5.0, 3.0, NAN, NAN]])
    interval = mean_interval(table)
    np.testing.assert_array_equal(interval.mean, [3.0, 2.0, NAN, 5.0])
    # t(.975, 2) s / sqrt(3) with s = 2, and t(.975, 1) s / sqrt(2) with s = sqrt(2).
    reach = np.array([4.302653 * 2 / math.sqrt(3), 12.706205, NAN, NAN])
    np.testing.assert_allclose(interval.low, interval.mean - reach, rtol=1e-6)
    np.testing.assert_allclose(interval.high, interval.mean + reach, rtol=1e-6)


def test_numbers_that_overflow_have_no_finite_interval_and_raise_nothing():
    interval = mean_interval(np.array([[1e300, 1.7e308], [-1e300, 1.7e308]]))
    assert interval.mean[0] == 0.0
    assert not np.isfinite([interval.low, interval.high]).any()


def test_columns_do_not_touch_each_other_and_repeat():
    table = np.random.default_rng(3).normal(size=(8, 5))
    whole, alone = mean_interval(table), mean_interval(table[:, 2:3])
    assert whole.low[2] == pytest.approx(alone.low[0], rel=1e-12)
    np.testing.assert_array_equal(whole.high, mean_interval(table).high)


def test_no_runs_and_no_columns():
    assert math.isnan(mean_interval(np.empty((0, 1))).mean[0])
    assert mean_interval(np.empty((3, 0))).mean.shape == (0,)


def test_the_pareto_front_by_hand():
    points = [(0.1, 0.5), (0.2, 0.8), (0.2, 0.7), (0.3, 0.8), (0.05, 0.4), (0.2, 0.8), (None, 0.9)]
    assert pareto_front(points) == [True, True, False, False, True, True, False]
    assert pareto_front([]) == []
    assert pareto_front([(0.1, None), (0.5, 0.1)]) == [False, True]


def test_the_interquartile_mean_by_hand():
    # A quarter of five values is one at each end: 2, 3 and 4 stay, whatever the ends are.
    assert interquartile_mean(np.array([100.0, 1.0, 2.0, NAN, 3.0, 4.0])).mean == 3.0
    # Of eight, two at each end.
    assert interquartile_mean(np.array([8, 7, 6, 5, 4, 3, 2, -90.0])).mean == 4.5
    assert np.isnan(interquartile_mean(np.array([1.0, 2.0, 3.0, 4.0, NAN]))).all()
    assert interquartile_mean(np.full(5, 0.5)) == (0.5, 0.5, 0.5)


def test_the_interval_of_the_interquartile_mean_is_the_bootstraps_and_repeats():
    values = np.random.default_rng(1).normal(size=9)
    draws = np.random.default_rng(2).choice(values, size=(200_000, 9))
    means = np.sort(draws, axis=1)[:, 2:7].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    estimate = interquartile_mean(values)
    # 5000 resamples put the ends at the 2.5 +- .4 and 97.5 +- .4 percentiles.
    assert estimate.low == pytest.approx(low, abs=0.06)
    assert estimate.high == pytest.approx(high, abs=0.06)
    assert interquartile_mean(values) == estimate


def test_the_probability_of_improvement_counts_pairs():
    generator = np.random.default_rng(1)
    x, y = generator.integers(0, 6, size=7) + 0.5, generator.integers(0, 5, size=6) + 0.5
    wins = sum((a > b) + (a == b) / 2 for a in x for b in y) / 42
    estimate = probability_of_improvement([(np.append(x, NAN), y)])
    assert estimate.mean == pytest.approx(wins, rel=1e-12)
    assert estimate.mean == pytest.approx(scipy.stats.mannwhitneyu(x, y).statistic / 42, rel=1e-12)
    assert estimate.low < estimate.mean < estimate.high
    assert probability_of_improvement([(x, y)]) == estimate, "it repeats"


def test_the_interval_of_the_probability_resamples_each_sample():
    generator = np.random.default_rng(1)
    x, y = generator.normal(0.5, size=9), generator.normal(size=6)
    draws = generator.choice(x, size=(50_000, 9)), generator.choice(y, size=(50_000, 6))
    wins = (draws[0][:, :, None] > draws[1][:, None, :]) + 0.0
    # An x and a y are equal nowhere.
    low, high = np.percentile(wins.mean(axis=(1, 2)), [2.5, 97.5])
    estimate = probability_of_improvement([(x, y)])
    assert estimate.low == pytest.approx(low, abs=0.03)
    assert estimate.high == pytest.approx(high, abs=0.03)


def test_strata_are_compared_and_resampled_on_their_own():
    low, high = np.array([0.0, 1, 2, 3, 4]), np.array([10.0, 11, 12, 13, 14])
    # .5 within each, though three quarters of all pairs would be wins or losses by scale.
    alone = probability_of_improvement([(low, low)])
    both = probability_of_improvement([(low, low), (high, high)])
    assert both.mean == alone.mean == 0.5
    assert 0 < both.high - both.low < alone.high - alone.low, "two strata are surer than one"
    assert probability_of_improvement([(high, low), (low, low)]).mean == 0.75


def test_few_seeds_have_a_probability_without_an_interval():
    few = probability_of_improvement([(np.array([1.0, 3.0]), np.array([2.0, 3.0, NAN]))])
    assert few.mean == (0 + 0 + 1 + 0.5) / 4
    assert np.isnan([few.low, few.high]).all()
    assert np.isnan(probability_of_improvement([(np.array([NAN]), np.array([1.0]))])).all()
    assert np.isnan(probability_of_improvement([])).all()


@pytest.mark.parametrize(
    ("value", "kept"),
    [(0.123456, 0.1235), (-123456.0, -123500.0), (1e-9, 1e-9), (float("nan"), None), (None, None)],
)
def test_numbers_have_four_digits(value, kept):
    assert rounded(value) == kept

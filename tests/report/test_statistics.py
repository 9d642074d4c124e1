import math

import numpy as np
import pytest
import scipy.stats

from rlhf_exp.report.statistics import bootstrap_mean, pareto_front

NAN = math.nan


def test_of_two_or_three_seeds_the_interval_is_the_range():
    # The chance of three times the same seed is 1/27 = .037 > .025, so nothing is cut off.
    for seeds in ([1.0, 2.0], [1.0, 2.0, 6.0]):
        interval = bootstrap_mean(np.array(seeds)[:, None])
        assert interval.mean[0] == pytest.approx(np.mean(seeds), rel=1e-12)
        assert (interval.low[0], interval.high[0]) == (min(seeds), max(seeds))


def test_four_seeds_by_hand():
    # 256 resamples of 0, 0, 0, 1: k ones with chance C(4, k) 3^(4-k) / 256. P(k <= 0) = .316, and
    # P(k >= 3) = 13/256 = .051, P(k = 4) = .004: the upper end is 3/4.
    interval = bootstrap_mean(np.array([[0.0], [0.0], [0.0], [1.0]]))
    assert (interval.low[0], interval.high[0]) == (0.0, 0.75)


@pytest.mark.parametrize("seeds", [5, 6, 12])
def test_it_agrees_with_scipy(seeds):
    table = np.random.default_rng(1).normal(size=(seeds, 30))
    own = bootstrap_mean(table)
    theirs = scipy.stats.bootstrap(
        (table,), np.mean, axis=0, method="percentile", n_resamples=20_000, rng=2
    ).confidence_interval
    # A step between neighboring resamples of five, and the noise of 400 drawn ones: both are about
    # a tenth of the spread, where a tail of .05 in place of .025 moves the ends by .2.
    tolerance = 0.12
    np.testing.assert_allclose(own.low, theirs.low, atol=tolerance)
    np.testing.assert_allclose(own.high, theirs.high, atol=tolerance)
    assert (own.low < own.mean).all()
    assert (own.mean < own.high).all()


def test_unknown_values_are_left_out_of_their_column():
    table = np.array([[1.0, 1.0, NAN, NAN], [3.0, NAN, NAN, 5.0], [5.0, 3.0, NAN, NAN]])
    interval = bootstrap_mean(table)
    np.testing.assert_array_equal(interval.mean, [3.0, 2.0, NAN, 5.0])
    np.testing.assert_array_equal(interval.low, [1.0, 1.0, NAN, NAN])
    np.testing.assert_array_equal(interval.high, [5.0, 3.0, NAN, NAN])


def test_columns_do_not_touch_each_other_and_repeat():
    table = np.random.default_rng(3).normal(size=(8, 5))
    whole, alone = bootstrap_mean(table), bootstrap_mean(table[:, 2:3])
    assert whole.low[2] == pytest.approx(alone.low[0], rel=1e-12)
    np.testing.assert_array_equal(whole.high, bootstrap_mean(table).high)


def test_no_runs_and_no_columns():
    assert math.isnan(bootstrap_mean(np.empty((0, 1))).mean[0])
    assert bootstrap_mean(np.empty((3, 0))).mean.shape == (0,)


def test_the_pareto_front_by_hand():
    points = [(0.1, 0.5), (0.2, 0.8), (0.2, 0.7), (0.3, 0.8), (0.05, 0.4), (0.2, 0.8), (NAN, 0.9)]
    assert pareto_front(points) == [True, True, False, False, True, True, False]
    assert pareto_front([]) == []
    assert pareto_front([(0.1, NAN), (0.5, 0.1)]) == [False, True]

import itertools
import math

import pytest
import torch

from rlhf_exp.runs.summary import Histogram, describe, histogram, summarize

NAN = math.nan


def test_metrics_are_described_in_a_line():
    assert describe({"eval/kl": 0.12345, "b": -2.0, "c": 100.0}) == (
        "eval/kl 0.123  b -2.000  c 100.000"
    )
    assert describe({"kl": -1e-8}) == "kl 0.000"
    assert describe({"x": NAN, "y": -0.0006}) == "x nan  y -0.001"
    assert describe({}) == ""


def test_a_histogram_by_hand():
    values = torch.tensor([0.0, 0.5, 1.0, 3.0, 4.0, 4.0, NAN, torch.inf, -torch.inf])
    # Of bins [0, 1), [1, 2), [2, 3) and [3, 4], after what is not finite is left out.
    assert histogram(values, num_bins=4) == Histogram(
        counts=(2, 1, 0, 3), edges=(0.0, 1.0, 2.0, 3.0, 4.0)
    )
    assert sum(histogram(torch.arange(1000.0)).counts) == 1000
    assert histogram(values.bfloat16(), num_bins=4) == histogram(values, num_bins=4)


def test_outliers_do_not_squeeze_the_others_into_a_bin():
    # Of 1001 values in order the 6th and the 996th are the quantiles: 0.005 and 0.995.
    values = torch.arange(1001.0) / 1000
    values[-1], values[0] = 5000.0, -7.0
    found = histogram(values[torch.randperm(1001)], num_bins=10)
    width = (0.995 - 0.005) / 10
    inner = [0.005 + width * i for i in range(1, 10)]
    assert found.edges == pytest.approx((-7.0, *inner, 5000.0), rel=1e-6)
    # Each bin is 99 of the values wide; the first and the last also hold the 5 beyond them.
    assert found.counts == pytest.approx((104, *[99] * 8, 105), abs=1)
    assert sum(found.counts) == 1001


def test_a_histogram_has_rising_edges_and_every_finite_value():
    torch.manual_seed(0)
    near = torch.tensor([1.0, 1 + 2**-23]).repeat(500)  # neighbors in float32
    ones = torch.cat([torch.ones(999), torch.tensor([3.0])])
    one_sided = torch.cat([torch.zeros(900), torch.rand(100)])
    awkward = [near, ones, one_sided, torch.tensor([1.0]), torch.tensor([2.0, 1.0]), torch.empty(0)]
    awkward += [torch.full((7,), 1e30), torch.randn(5000).exp() ** 5, torch.tensor([-3e38, 3e38])]
    for values in awkward:
        found = histogram(values)
        assert sum(found.counts) == len(values)
        assert len(found.counts) == 64
        assert all(a < b for a, b in itertools.pairwise(found.edges))
        if len(set(values.tolist())) > 1:
            assert (found.edges[0], found.edges[-1]) == (values.min(), values.max())


def test_a_histogram_of_one_value_or_none_has_edges():
    assert histogram(torch.ones(5), num_bins=2) == Histogram(counts=(0, 5), edges=(0.5, 1.0, 1.5))
    assert sum(histogram(torch.full((3,), NAN)).counts) == 0


def test_a_summary_has_the_best_evaluation_and_the_last():
    rows = [
        {"phase": 0, "eval/score": 0.25, "eval/kl": 0.0},
        {"phase": 1, "objective/scores": 0.5},
        {"phase": 2, "eval/score": 0.75, "eval/kl": 0.125},
        {"phase": 3, "eval/score": None, "eval/kl": 1.0},
        {"phase": 4, "eval/score": 0.75, "eval/kl": 0.25},
        {"phase": 6, "eval/score": 0.5, "eval/kl": 0.5, "eval/entropy": None},
        {"phase": 7, "objective/scores": 0.5},
    ]
    assert summarize(rows) == {
        "best/eval_score": 0.75,
        "best/phase": 2,
        "final/eval_score": 0.5,
        "final/eval_kl": 0.5,
    }
    assert summarize(rows[1:2]) == summarize([]) == {}

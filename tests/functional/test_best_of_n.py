"""Exact in float64: every golden is a sum over all sets or all draws, made by a loop."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_exp.functional.best_of_n import best_of_n_kl, best_of_n_kl_bound, best_of_n_weights

DISTINCT = [0.5, -1.0, 2.0, 0.25, 7.5, -3.0, 1.0]
TIED = [1.0, 0.0, 1.0, 2.0, 0.0, 1.0, 2.0]
EQUAL = [3.0] * 7
SCORES = [DISTINCT, TIED, EQUAL]
TRUE = [5.0, 1.0, -2.0, 4.0, 0.5, 3.0, -1.0]


def tensor(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def loop_weights(scores: Sequence[float], n: int) -> list[float]:
    """The share of all sets of n in which each place is the best; the best of a set share it."""
    sets = [*itertools.combinations(range(len(scores)), n)]
    weights = [0.0] * len(scores)
    for places in sets:
        highest = max(scores[place] for place in places)
        best = [place for place in places if scores[place] == highest]
        for place in best:
            weights[place] += 1 / len(best) / len(sets)
    return weights


def loop_kl(scores: Sequence[float], n: int) -> float:
    """The KL over places of the best of n independent draws, ties drawn at random, to one draw."""
    chosen: Counter[int] = Counter()
    draws = [*itertools.product(range(len(scores)), repeat=n)]
    for places in draws:
        highest = max(scores[place] for place in places)
        best = [place for place in places if scores[place] == highest]
        for place in best:
            chosen[place] += 1 / len(best) / len(draws)
    return math.fsum(q * math.log(q * len(scores)) for q in chosen.values())


@pytest.mark.parametrize("n", range(1, 8))
def test_weights_are_the_shares_of_all_sets_in_which_a_completion_is_the_best(n: int) -> None:
    expected = [loop_weights(scores, n) for scores in SCORES]
    assert_close(best_of_n_weights(tensor(SCORES), n), tensor(expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", range(1, 8))
def test_the_expected_best_is_the_mean_over_all_sets(n: int) -> None:
    """Of the score itself, and of another number of the completion that the score prefers."""
    scores = tensor([DISTINCT])
    sets = [*itertools.combinations(range(7), n)]
    best = [max(places, key=lambda place: DISTINCT[place]) for places in sets]
    for values in (DISTINCT, TRUE):
        expected = math.fsum(values[place] for place in best) / len(sets)
        actual = (best_of_n_weights(scores, n) * tensor([values])).sum().item()
        assert actual == pytest.approx(expected, abs=1e-13)


def test_the_best_of_one_is_the_mean_and_of_all_is_the_highest() -> None:
    scores = tensor(SCORES)
    one, every = (best_of_n_weights(scores, n) for n in (1, 7))
    assert_close(one, torch.full_like(scores, 1 / 7), rtol=0, atol=1e-15)
    highest = [[0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0.5, 0, 0, 0.5], [1 / 7] * 7]
    assert_close(every, tensor(highest), rtol=0, atol=1e-15)


def test_weights_of_many_samples_do_not_overflow() -> None:
    """C(512, 256) has 152 digits. Of n of 512 ranks the highest is on average n 513 / (n + 1)."""
    ranks = torch.arange(1.0, 513.0)[torch.randperm(512)][None]
    for n in (1, 2, 100, 256, 511, 512):
        weights = best_of_n_weights(ranks, n)
        assert weights.dtype == torch.float64
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)
        expected = n * 513 / (n + 1)
        assert (weights * ranks).sum().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", range(1, 6))
def test_the_kl_is_that_of_all_draws_from_the_samples(n: int) -> None:
    rows = [scores[:5] for scores in SCORES]
    expected = tensor([loop_kl(row, n) for row in rows])
    assert_close(best_of_n_kl(tensor(rows), n), expected, rtol=0, atol=1e-13)


def test_the_kl_of_two_scores_by_hand() -> None:
    """A third of the samples has the higher score, and 5/9 of the best of two."""
    expected = 5 / 9 * math.log(5 / 3) + 4 / 9 * math.log(2 / 3)
    actual = best_of_n_kl(tensor([[0, 1, 0], [-2, -2, 9]]), 2)
    assert_close(actual, tensor([expected, expected]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("scores", SCORES)
def test_the_kl_of_one_or_of_equal_scores_is_zero(scores: list[float]) -> None:
    for n in range(1, 8):
        kl = best_of_n_kl(tensor([EQUAL, scores]), n)
        assert kl[0].item() == pytest.approx(0, abs=1e-15)
        assert (kl[1].item() == pytest.approx(0, abs=1e-15)) == (n == 1 or scores is EQUAL)


def test_the_bound_is_the_kl_of_a_score_without_ties() -> None:
    """q(u) = n u^(n - 1) on [0, 1] against 1, by the midpoints of a fine grid."""
    grid = [(i + 0.5) / 20000 for i in range(20000)]
    for n in (1, 2, 5, 64):
        q = [n * u ** (n - 1) for u in grid]
        integral = math.fsum(x * math.log(x) for x in q if x) / len(grid)
        assert best_of_n_kl_bound(n) == pytest.approx(integral, abs=1e-4)


def test_the_kl_is_below_its_bound_and_near_it_for_many_distinct_scores(
    generator: torch.Generator,
) -> None:
    for count in (2, 3, 16, 256):
        distinct = torch.randperm(count, generator=generator)[None].double()
        tied = torch.randint(count // 2 + 1, (20, count), generator=generator).double()
        for n in {1, 2, count // 4 or 1, count}:
            bound = best_of_n_kl_bound(n)
            assert bool((best_of_n_kl(torch.cat([distinct, tied]), n) <= bound + 1e-12).all())
            # What the docstring says of n = N and n = N / 4.
            missing = 0.07 if 4 * n > count else 0.006 if count < 64 else 0.003
            assert bound - best_of_n_kl(distinct, n).item() < missing


@pytest.mark.parametrize("n", [0, 8])
def test_more_than_there_are_is_refused(n: int) -> None:
    for function in (best_of_n_weights, best_of_n_kl):
        with pytest.raises(ValueError, match=f"n={n} must be 1 to 7, the samples of each prompt"):
            function(tensor(SCORES), n)

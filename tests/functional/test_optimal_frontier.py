"""The frontier where it is known: bandits, a Gaussian score, and what an optimiser finds."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from rlhf_exp.functional.optimal_frontier import (
    MIN_SAMPLES,
    frontier,
    optimal_kl,
    optimal_kl_interval,
    tilt,
)

# A bandit whose samples are exact: each arm as often as it is likely.
ARMS, REWARDS = torch.tensor([0.5, 0.25, 0.125, 0.125]), torch.tensor([0.0, 1.0, -2.0, 3.0])
EXACT = REWARDS.repeat_interleave((64 * ARMS).long())[None]


def of_bandit(eta: float) -> tuple[float, float]:
    """Score and KL of the bandit's tilted policy, from the arms' probabilities."""
    policy = (ARMS.double().log() + eta * REWARDS.double()).softmax(dim=0)
    kl = (policy * (policy / ARMS).log()).sum()
    return (policy * REWARDS).sum().item(), kl.item()


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 2.5])
def test_a_bandit(eta: float) -> None:
    score, kl = of_bandit(eta)
    point = tilt(EXACT, eta)
    assert point.score == pytest.approx(score, abs=1e-12)
    assert point.kl == pytest.approx(kl, abs=1e-12)
    assert optimal_kl(EXACT.repeat(1, 8), score) == pytest.approx(kl, abs=1e-9)


def test_the_best_samples_alone_and_beyond() -> None:
    assert optimal_kl(EXACT.repeat(1, 8), 3.0) == pytest.approx(math.log(8), abs=1e-12)
    assert optimal_kl(EXACT, 3.0) is None  # eight samples
    assert optimal_kl(EXACT.repeat(1, 8), 3.001) is None
    assert optimal_kl(EXACT, EXACT.mean().item()) == 0
    assert optimal_kl(EXACT, -1.0) == 0
    assert tilt(EXACT, math.inf).samples == pytest.approx(8)


def test_prompts_share_eta_as_an_optimiser_finds() -> None:
    """Two prompts of other scores: no policy with that mean score has less KL."""
    scores = torch.tensor([[0.0, 1.0, 4.0, 2.0], [0.5, -1.0, 0.0, 1.0]], dtype=torch.float64)
    target = 1.4

    def kl(logits: np.ndarray) -> float:
        shares = torch.tensor(logits).view(2, 4).softmax(dim=1)
        return (shares * (4 * shares).log()).sum(dim=1).mean().item()

    def excess(logits: np.ndarray) -> float:
        shares = torch.tensor(logits).view(2, 4).softmax(dim=1)
        return (shares * scores).sum(dim=1).mean().item() - target

    found = minimize(kl, np.zeros(8), constraints={"type": "eq", "fun": excess}, tol=1e-12)
    repeated = scores.repeat(1, 100)  # equally likely completions, often enough
    assert optimal_kl(repeated, target) == pytest.approx(found.fun, abs=1e-6)
    each_alone = [optimal_kl(row[None], target) for row in repeated[:1]]
    assert each_alone != pytest.approx([found.fun], abs=1e-2)


def test_a_reference_tilted_by_hand_lies_on_the_frontier() -> None:
    """A score of mean 0 and deviation 1, normally distributed: KL = score^2 / 2."""
    scores = torch.distributions.Normal(0, 1).icdf((torch.arange(20000) + 0.5) / 20000)[None]
    for score in (0.25, 1.0, 1.75):
        assert optimal_kl(scores, score) == pytest.approx(score**2 / 2, rel=0.01)


def test_the_frontier_rises_and_ends_where_the_samples_do() -> None:
    scores = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    points = frontier(scores)
    assert points[0].kl == 0
    assert points[0].score == pytest.approx(scores.double().mean().item())
    for before, after in itertools.pairwise(points):
        assert after.score > before.score
        assert after.kl > before.kl
        assert MIN_SAMPLES <= after.samples < before.samples
    assert len(points) < 50
    assert [p.kl for p in points[:5]] == [optimal_kl(scores, p.score) for p in points[:5]]
    assert len(frontier(torch.ones(2, 5))) == 1
    assert len(frontier((scores > 1).float())) == 50  # many samples are the best


def test_the_interval_covers() -> None:
    """Of 95% intervals from other samples, about as many contain the bandit's KL."""
    score, kl = of_bandit(1.0)
    covered, generator = 0, torch.Generator().manual_seed(1)
    for _ in range(200):
        arms = torch.multinomial(ARMS, 150, replacement=True, generator=generator)
        interval = optimal_kl_interval(REWARDS[arms][None], score, generator=generator)
        assert interval is not None
        covered += interval[0] <= kl <= interval[1]
    assert 178 <= covered <= 198
    assert optimal_kl_interval(EXACT, 2.99, generator=generator) is None
    few = torch.tensor([[0.0] * 80 + [1.0] * 2 + [0.9] * 18])  # 0.97 needs the two
    assert optimal_kl_interval(few, 0.915, generator=generator)[1] == math.inf


def test_scores_of_any_scale_and_a_distant_outlier() -> None:
    scores = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).double()
    expected = optimal_kl(scores, 0.8)
    for scale, shift in ((1e-6, 0.0), (1e4, -3e5)):
        found = optimal_kl(scale * scores + shift, scale * 0.8 + shift)
        assert_close(found, expected, rtol=1e-5, atol=0)
    scores[:, 0] = -1e9
    assert optimal_kl(scores, 0.8) is not None

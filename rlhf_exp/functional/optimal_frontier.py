"""The frontier of score against KL that no policy can pass, from the scores of N samples of the
reference for each prompt. Knows scores, not completions. All numbers are in fp64.

Among the policies with a mean score, the one nearest to the reference q is p(y) proportional to
q(y) exp(eta s(y)), with the same eta >= 0 for all prompts. On the samples it has the weights
w_i = exp(eta s_i) / sum_j exp(eta s_j) of each prompt, hence the score sum_i w_i s_i and the KL
sum_i w_i log(N w_i), nats a completion; both are means over prompts. Source: Korbak et al. 2022,
arXiv 2205.11275, equation 6, whose beta is 1 / eta.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

MIN_SAMPLES = 10.0  # effective samples, below which the estimate of the KL is not used
STEPS = 80  # of the bisection for eta


class Tilt(NamedTuple):
    """A point of the frontier. `samples` is the effective sample size 1 / sum w^2 of a prompt, the
    harmonic mean over prompts: the estimate of the KL errs by about 1 / (2 samples)."""

    score: float
    kl: float
    samples: float


def tilt(scores: Float[Tensor, "prompt completion"], eta: float) -> Tilt:
    """The point of the frontier at that eta; infinity puts all weight on the best samples."""
    etas = torch.tensor([eta], dtype=torch.float64)
    score, kl, samples = (x.item() for x in _moments(scores.double()[None], etas))
    return Tilt(score=score, kl=kl, samples=samples)


def frontier(scores: Float[Tensor, "prompt completion"], *, points: int = 50) -> list[Tilt]:
    """Points from the reference's own to the last that the samples support, at equal distances of
    score."""
    lowest, highest = (tilt(scores, eta) for eta in (0.0, math.inf))
    if lowest.score == highest.score:
        return [lowest]
    targets = torch.linspace(lowest.score, highest.score, points, dtype=torch.float64)
    copies = scores.double().expand(points, -1, -1)
    columns = (column.tolist() for column in _moments(copies, _solve(copies, targets)))
    found = (Tilt(*point) for point in zip(*columns, strict=True))
    return [point for point in found if point.samples >= MIN_SAMPLES]


def optimal_kl(scores: Float[Tensor, "prompt completion"], target: float) -> float | None:
    """The least KL of a policy with that mean score, nats a completion; 0 if the reference has it.
    None if the samples do not tell: their best scores are lower, or fewer than ten effective
    samples would carry it."""
    targets = torch.tensor([target], dtype=torch.float64)
    scores = scores.double()[None]
    _, kl, samples = _moments(scores, _solve(scores, targets))
    is_known = samples >= MIN_SAMPLES  # False for NaN
    return max(0.0, kl.item()) if is_known else None


def optimal_kl_interval(
    scores: Float[Tensor, "prompt completion"],
    target: float,
    *,
    generator: torch.Generator,
    confidence: float = 0.95,
    resamples: int = 200,
) -> tuple[float, float] | None:
    """The percentile interval of `optimal_kl` over bootstrap resamples of each prompt's
    completions; None where that is None. A resample whose best scores are below the target counts
    as an infinite KL, so the upper end may be infinite."""
    if optimal_kl(scores, target) is None:
        return None
    size = (resamples, *scores.shape)
    index = torch.randint(scores.shape[1], size, generator=generator)
    drawn = scores.double().expand(size).gather(2, index)
    targets = torch.full((resamples,), target, dtype=torch.float64)
    kl = _moments(drawn, _solve(drawn, targets))[1].nan_to_num(nan=math.inf).clamp(min=0)
    ordered, tail = kl.sort().values, round((1 - confidence) / 2 * resamples)
    return ordered[tail].item(), ordered[-1 - tail].item()


def _moments(scores: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score, KL and effective samples [set] of sets of scores [set prompt completion], each at its
    own eta [set]; NaN for a NaN."""
    best = scores.amax(dim=2, keepdim=True)
    is_best = scores == best
    # exp(-inf * 0) is NaN, so the best samples, whose exponent is 0, are not multiplied.
    exponent = torch.where(is_best, 0.0, eta[:, None, None] * (scores - best))
    weights = exponent.softmax(dim=2)
    kl = torch.xlogy(weights, weights * scores.shape[2]).sum(dim=2).mean(dim=1)
    score = (weights * scores).sum(dim=2).mean(dim=1)
    samples = 1 / weights.square().sum(dim=2).mean(dim=1)
    unknown = 0 * eta.nan_to_num(posinf=0.0, nan=math.nan)  # NaN for a NaN, else 0
    return score + unknown, kl + unknown, samples + unknown


def _solve(scores: Tensor, targets: Tensor) -> Tensor:
    """The eta [set] at which each set of scores [set prompt completion] has its target [set]: 0 if
    the mean is as high, infinity if only the best samples are, NaN if not even these."""
    low, high = torch.zeros_like(targets), torch.ones_like(targets)
    zero, infinite = low, torch.full_like(low, math.inf)
    best = _moments(scores, infinite)[0]
    for _ in range(STEPS):  # exponents double until the bracket holds the target
        high = torch.where(_moments(scores, high)[0] < targets, 2 * high, high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        is_low = _moments(scores, middle)[0] < targets
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    eta = torch.where(targets <= _moments(scores, zero)[0], zero, high)
    eta = torch.where(targets == best, infinite, eta)
    return torch.where(targets > best, math.nan, eta)

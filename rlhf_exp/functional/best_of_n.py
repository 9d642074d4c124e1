"""The best of n samples: weights for expected values, and the KL, from the scores of N >= n samples
of each prompt. Knows scores, not completions.

`lower` of a completion is the number of its prompt's scores below its own, `upper` the number not
above it; they differ by the number of completions with that score.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def best_of_n_weights(
    scores: Float[Tensor, "prompt completion"], n: int
) -> Float[Tensor, "prompt completion"]:
    """The probability that each completion is the best of n of its prompt's N, drawn without
    replacement; equal scores share theirs equally. In fp64.

    Any quantity summed with these weights is an unbiased estimate of its mean over best-of-n
    samples; for the scores this is the expected maximum. The weights are (C(upper, n) -
    C(lower, n)) / C(N, n) / (upper - lower): C(i - 1, n - 1) / C(N, n) for the i-th lowest of
    distinct scores. Source: Hilton and Gao 2022, "Measuring Goodhart's law". Raises ValueError
    unless n is 1 to N.
    """
    lower, upper = _ranks(scores, n)
    total = scores.shape[1]
    sets = math.comb(total, n)  # the quotient of two integers of any size is rounded once
    below = [math.comb(rank, n) / sets for rank in range(total + 1)]
    return _differences(below, lower, upper) / (upper - lower)


def best_of_n_kl(scores: Float[Tensor, "prompt completion"], n: int) -> Float[Tensor, " prompt"]:
    """D(best of n || base) of each prompt in nats a completion, estimated from N samples of the
    base. In fp64.

    With ties broken at random, best of n keeps the base's proportions among completions of equal
    score. So the KL is that of the scores: sum_s q(s) log(q(s) / p(s)), with p(s) = F(s) - F(s-),
    q(s) = F(s)^n - F(s-)^n (Beirami et al. 2024, arXiv 2401.01879) and F the base's distribution
    function of scores. The plug-in estimate takes the F of the N samples. It is at most
    `best_of_n_kl_bound`. It is too low if the best scores are rarer than the samples can show; for
    a score without ties by 0.04 nats at n = N and by 0.003 at n = N / 4. Raises ValueError unless
    n is 1 to N.
    """
    lower, upper = _ranks(scores, n)
    total = scores.shape[1]
    below = [(rank / total) ** n for rank in range(total + 1)]
    shares = _differences(below, lower, upper) / (upper - lower)  # of each sample of a score
    return torch.xlogy(shares, shares * total).sum(dim=1)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1) / n, the highest possible D(best of n || base); reached by a score without
    ties, as by a continuous one. Source: Beirami et al. 2024, arXiv 2401.01879, theorem 3.1."""
    return math.log(n) - (n - 1) / n


def _ranks(
    scores: Float[Tensor, "prompt completion"], n: int
) -> tuple[Int[Tensor, "prompt completion"], Int[Tensor, "prompt completion"]]:
    """`lower` and `upper` of each completion."""
    if not 1 <= n <= scores.shape[1]:
        raise ValueError(f"n={n} must be 1 to {scores.shape[1]}, the samples of each prompt")
    ordered = scores.sort(dim=1).values
    lower = torch.searchsorted(ordered, scores)
    return lower, torch.searchsorted(ordered, scores, right=True)


def _differences(below: list[float], lower: Tensor, upper: Tensor) -> Tensor:
    table = torch.tensor(below, dtype=torch.float64, device=lower.device)
    return table[upper] - table[lower]

"""Intervals of means over samples of different lengths."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Means(NamedTuple):
    """Means and the ends of their intervals; NaN for unknown."""

    mean: Float[Tensor, " group"]
    low: Float[Tensor, " group"]
    high: Float[Tensor, " group"]


def ratio_means(
    sums: Float[Tensor, "sample group"],
    counts: Float[Tensor, "sample group"],
    *,
    confidence: float = 0.95,
) -> Means:
    """The mean per token of each group, m = sum_i s_i / sum_i c_i, and its interval
    m +- t(n - 1) sqrt(n / (n - 1) sum_i (s_i - m c_i)^2) / sum_i c_i.

    s_i is the sum of a quantity over the c_i tokens of the group in sample i, and n the number of
    samples with such tokens. Tokens of one sample are not independent, so the samples are the
    units. A group without tokens has no mean, one in a single sample no interval. Source: the ratio
    estimator, Cochran, Sampling Techniques (1977), section 2.11.
    """
    from scipy.special import stdtrit

    sums, counts = sums.double(), counts.double()
    total = counts.sum(dim=0)
    mean = sums.sum(dim=0) / total
    residuals = (sums - torch.where(total > 0, mean, 0) * counts).square().sum(dim=0)
    num = (counts > 0).sum(dim=0).double()
    quantile = torch.from_numpy(stdtrit((num - 1).clamp(min=1).numpy(), (1 + confidence) / 2))
    reach = quantile * (num / (num - 1) * residuals).sqrt() / total
    return Means(*(x.float() for x in (mean, mean - reach, mean + reach)))

"""The terms of the objectives, one function each. Knows equations, not the coefficients' values.

Padding is zeroed first, so that its content changes neither values nor gradients.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_exp.functional.masking import masked_fill_zero, masked_mean


def clipped_surrogate(
    logprobs: Float[Tensor, "batch completion"],
    old_logprobs: Float[Tensor, "batch completion"],
    advantages: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    *,
    clip_coef: float,
) -> Float[Tensor, ""]:
    """Mean over real tokens of min(ratio A, clip(ratio, 1 - clip_coef, 1 + clip_coef) A).

    An objective to maximise. ratio = exp(logprobs - old_logprobs). Source: Schulman et al. 2017,
    arXiv 1707.06347, equation 7.
    """
    ratio = masked_fill_zero(logprobs - old_logprobs, mask).exp()
    advantages = masked_fill_zero(advantages, mask)
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def clip_fraction(
    logprobs: Float[Tensor, "batch completion"],
    old_logprobs: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    *,
    clip_coef: float,
) -> Float[Tensor, ""]:
    """Fraction of real tokens whose ratio is farther than clip_coef from 1."""
    ratio = masked_fill_zero(logprobs - old_logprobs, mask).exp()
    return masked_mean(((ratio - 1).abs() > clip_coef).to(logprobs.dtype), mask)


def value_loss(
    values: Float[Tensor, "batch completion"],
    returns: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
) -> Float[Tensor, ""]:
    """Mean over real tokens of (values - returns)^2 / 2."""
    return masked_mean(masked_fill_zero(values - returns, mask).square() / 2, mask)


def clipped_value_loss(
    values: Float[Tensor, "batch completion"],
    old_values: Float[Tensor, "batch completion"],
    returns: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    *,
    value_clip_coef: float,
) -> Float[Tensor, ""]:
    """Mean of max((V - R)^2, (V_clipped - R)^2) / 2, V_clipped within value_clip_coef of the
    rollout's values. Source: OpenAI baselines, ppo2."""
    values, old_values, returns = (masked_fill_zero(x, mask) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-value_clip_coef, value_clip_coef)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return masked_mean(worse / 2, mask)


def reward_mse(pred: Float[Tensor, " batch"], target: Float[Tensor, " batch"]) -> Tensor:
    """Mean squared error of predicted rewards."""
    return F.mse_loss(pred, target)


def pairwise_rank_loss(
    chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean of -log sigmoid(chosen - rejected), computed without overflow. Source: Bradley-Terry;
    Ouyang et al. 2022, arXiv 2203.02155, equation 1."""
    return F.softplus(rejected - chosen).mean()

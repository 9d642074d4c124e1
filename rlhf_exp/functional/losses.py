"""The terms of the objectives, one function each. Knows equations, not the coefficients' values.

Padding is zeroed first, so that its content changes neither values nor gradients.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_exp.functional.masking import Aggregation, aggregate, masked_fill_zero


def clipped_surrogate(
    logprobs: Float[Tensor, "batch completion"],
    old_logprobs: Float[Tensor, "batch completion"],
    advantages: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    *,
    clip_coef: float,
    clip_coef_high: float | None = None,
    dual_clip_coef: float | None = None,
    aggregation: Aggregation = "token_mean",
) -> Float[Tensor, ""]:
    """Mean over real tokens of min(ratio A, clip(ratio, 1 - clip_coef, 1 + clip_coef_high) A).

    An objective to maximise. ratio = exp(logprobs - old_logprobs); clip_coef_high is clip_coef by
    default. With dual_clip_coef a term of a negative A is at least dual_clip_coef A. Sources:
    Schulman et al. 2017, arXiv 1707.06347, equation 7; clip_coef_high: Yu et al. 2025 (DAPO), arXiv
    2503.14476; dual_clip_coef: Ye et al. 2019, arXiv 1912.09729, equation 5.
    """
    ratio = masked_fill_zero(logprobs - old_logprobs, mask).exp()
    advantages = masked_fill_zero(advantages, mask)
    high = clip_coef if clip_coef_high is None else clip_coef_high
    clipped = ratio.clamp(1 - clip_coef, 1 + high)
    terms = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip_coef is not None:
        bounded = torch.maximum(terms, dual_clip_coef * advantages)
        terms = torch.where(advantages < 0, bounded, terms)
    return aggregate(terms, mask, aggregation)


def sequence_log_ratio(
    logprobs: Float[Tensor, "batch completion"],
    old_logprobs: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
) -> Float[Tensor, "batch 1"]:
    """The mean of logprobs - old_logprobs over each row's real tokens, 0 for a row without any: the
    logarithm of GSPO's ratio. Source: Zheng et al. 2025, arXiv 2507.18071, equation 7."""
    difference = masked_fill_zero(logprobs - old_logprobs, mask)
    return difference.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def policy_gradient(
    logprobs: Float[Tensor, "batch completion"],
    old_logprobs: Float[Tensor, "batch completion"],
    advantages: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    *,
    importance_cap: float | None = None,
    aggregation: Aggregation = "token_mean",
) -> Float[Tensor, ""]:
    """Mean over real tokens of A log p: REINFORCE.

    An objective to maximise. With importance_cap each term is multiplied by min(ratio,
    importance_cap), without a gradient; that corrects for samples of an older policy. Sources:
    Williams 1992; truncated importance sampling: Ionides 2008.
    """
    terms = masked_fill_zero(logprobs, mask) * masked_fill_zero(advantages, mask)
    if importance_cap is not None:
        ratio = masked_fill_zero(logprobs - old_logprobs, mask).detach().exp()
        terms = terms * ratio.clamp(max=importance_cap)
    return aggregate(terms, mask, aggregation)


def clip_fraction(
    logprobs: Float[Tensor, "batch completion"],
    old_logprobs: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    *,
    clip_coef: float,
    clip_coef_high: float | None = None,
    aggregation: Aggregation = "token_mean",
) -> Float[Tensor, ""]:
    """Fraction of real tokens whose ratio is below 1 - clip_coef or above 1 + clip_coef_high, which
    is clip_coef by default."""
    change = masked_fill_zero(logprobs - old_logprobs, mask).exp() - 1
    high = clip_coef if clip_coef_high is None else clip_coef_high
    outside = (change < -clip_coef) | (change > high)
    return aggregate(outside.to(logprobs.dtype), mask, aggregation)


def value_loss(
    values: Float[Tensor, "batch completion"],
    returns: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    *,
    aggregation: Aggregation = "token_mean",
) -> Float[Tensor, ""]:
    """Mean over real tokens of (values - returns)^2 / 2."""
    return aggregate(masked_fill_zero(values - returns, mask).square() / 2, mask, aggregation)


def clipped_value_loss(
    values: Float[Tensor, "batch completion"],
    old_values: Float[Tensor, "batch completion"],
    returns: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    *,
    value_clip_coef: float,
    aggregation: Aggregation = "token_mean",
) -> Float[Tensor, ""]:
    """Mean of max((V - R)^2, (V_clipped - R)^2) / 2, V_clipped within value_clip_coef of the
    rollout's values. Source: OpenAI baselines, ppo2."""
    values, old_values, returns = (masked_fill_zero(x, mask) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-value_clip_coef, value_clip_coef)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return aggregate(worse / 2, mask, aggregation)


def reward_mse(pred: Float[Tensor, " batch"], target: Float[Tensor, " batch"]) -> Tensor:
    """Mean squared error of predicted rewards."""
    return F.mse_loss(pred, target)


def pairwise_rank_loss(
    chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean of -log sigmoid(chosen - rejected), computed without overflow. Source: Bradley-Terry;
    Ouyang et al. 2022, arXiv 2203.02155, equation 1."""
    return F.softplus(rejected - chosen).mean()


def dpo_loss(
    chosen: Float[Tensor, " pair"],
    rejected: Float[Tensor, " pair"],
    ref_chosen: Float[Tensor, " pair"],
    ref_rejected: Float[Tensor, " pair"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean of -(1 - label_smoothing) log sigmoid(beta h) - label_smoothing log sigmoid(-beta h).

    h = (chosen - ref_chosen) - (rejected - ref_rejected), from the log-probs of whole answers.
    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7. `label_smoothing` is the assumed
    fraction of pairs in the wrong order: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    logits = beta * _log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected)
    losses = (1 - label_smoothing) * F.softplus(-logits) + label_smoothing * F.softplus(logits)
    return losses.mean()


def ipo_loss(
    chosen: Float[Tensor, " pair"],
    rejected: Float[Tensor, " pair"],
    ref_chosen: Float[Tensor, " pair"],
    ref_rejected: Float[Tensor, " pair"],
    *,
    beta: float,
) -> Float[Tensor, ""]:
    """Mean of (h - 1 / (2 beta))^2, h as in `dpo_loss`.

    Source: Azar et al. 2023, arXiv 2310.12036, equation 17, where beta is tau. As there, log-probs
    are sums over the answer's tokens. TRL's loss_type="ipo" takes means, which its comment says the
    authors did in their experiments.
    """
    difference = _log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected)
    return (difference - 1 / (2 * beta)).square().mean()


def _log_ratio_difference(
    chosen: Float[Tensor, " pair"],
    rejected: Float[Tensor, " pair"],
    ref_chosen: Float[Tensor, " pair"],
    ref_rejected: Float[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    return (chosen - ref_chosen) - (rejected - ref_rejected)

"""Rewards, advantages and returns from scores. Knows tokens, not models.

Position t is the t-th completion token: rewards[:, t] is received for emitting it, values[:, t]
is the value of the state before it. After the last real token the value is 0.
"""

from typing import Literal

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_exp.functional.masking import masked_fill_zero


def normalize_reward(scores: Float[Tensor, " batch"], *, eps: float = 1e-5) -> Tensor:
    """(scores - mean) / (std + eps) over the batch, std unbiased; 0 for one or equal scores."""
    if scores.numel() < 2:
        return torch.zeros_like(scores)
    scores = scores - scores[0]  # exactly 0 for equal scores, whatever their mean would round to
    return (scores - scores.mean()) / (scores.std() + eps)


def terminal_rewards(
    scores: Float[Tensor, " batch"], mask: Bool[Tensor, "batch completion"]
) -> Float[Tensor, "batch completion"]:
    """The score at each row's last real token, 0 elsewhere.

    A row without real tokens is all 0. On padded rows TRL puts the score one position later
    (`sequence_lengths_p1`).
    """
    last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
    spread = einops.repeat(scores, "batch -> batch completion", completion=mask.shape[1])
    return masked_fill_zero(spread, last)


def gae(
    values: Float[Tensor, "batch completion"],
    rewards: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    *,
    gamma: float,
    gae_lambda: float,
) -> Float[Tensor, "batch completion"]:
    """Generalised advantage estimates, 0 in the padding.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma gae_lambda A_{t+1}, with V = 0
    after the last real token. gae_lambda=0 gives one-step advantages, gae_lambda=1 the
    discounted return minus V. `mask` is True on a prefix of each row. Source: Schulman et al.
    2015, arXiv 1506.02438, equation 16.
    """
    values, rewards = masked_fill_zero(values, mask), masked_fill_zero(rewards, mask)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantage = deltas.new_zeros(deltas.shape[0])
    advantages = torch.zeros_like(deltas)
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * gae_lambda * advantage
        advantages[:, t] = advantage
    return advantages


def leave_one_out(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Each score minus the mean of the other scores in its group; groups may differ in size.

    Exactly 0 in a group of equal scores. Raises ValueError if a group has only one sample. Source:
    Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free"; the estimator of RLOO
    (Ahmadian et al. 2024, arXiv 2402.14740, equation 4).
    """
    shifted, sums, index, counts = _grouped(scores, groups)
    if bool((counts == 1).any()):
        raise ValueError("leave_one_out needs at least two samples of each prompt")
    return shifted - (sums[index] - shifted) / (counts[index] - 1)


def group_normalized(
    scores: Float[Tensor, " batch"],
    groups: Int[Tensor, " batch"],
    *,
    scale: Literal["std", "none"] = "std",
    eps: float = 1e-4,
) -> Float[Tensor, " batch"]:
    """(score - mean) / (std + eps) within each group, std unbiased; with scale="none" score - mean.

    Exactly 0 in a group of equal scores or of one sample. Sources: Shao et al. 2024 (GRPO), arXiv
    2402.03300; without std: Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783. Raises ValueError for
    another scale.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale={scale!r} must be std or none")
    shifted, sums, index, counts = _grouped(scores, groups)
    centred = shifted - (sums / counts)[index]
    if scale == "none":
        return centred
    squares = scores.new_zeros(len(counts)).index_add(0, index, centred.square())
    std = (squares / (counts - 1).clamp(min=1)).sqrt()
    return centred / (std[index] + eps)


def equal_groups(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"]
) -> Bool[Tensor, " batch"]:
    """True for each sample whose group has equal scores."""
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    empty = scores.new_zeros(len(counts))
    highest, lowest = (
        empty.scatter_reduce(0, index, scores, reduce, include_self=False)
        for reduce in ("amax", "amin")
    )
    return (highest == lowest)[index]


def best_of_groups(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"]
) -> Bool[Tensor, " batch"]:
    """True for the sample of the highest score in each group, the first of several; for none of a
    group of equal scores."""
    shifted, sums, index, counts = _grouped(scores, groups)
    places = torch.arange(len(scores), device=scores.device)
    is_highest = (shifted == 0) & (sums[index] < 0)  # a sum of 0: equal scores
    first = places.new_full((len(counts),), len(scores))
    first = first.scatter_reduce(0, index[is_highest], places[is_highest], "amin")
    return places == first[index]


def _grouped(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"]
) -> tuple[
    Float[Tensor, " batch"], Float[Tensor, " group"], Int[Tensor, " batch"], Int[Tensor, " group"]
]:
    """Each score minus the highest of its group, their sum in each group, the index of each score's
    group, and the groups' sizes. Equal scores become 0, whose sum is not rounded."""
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    empty = scores.new_zeros(len(counts))
    highest = empty.scatter_reduce(0, index, scores, "amax", include_self=False)
    shifted = scores - highest[index]
    return shifted, empty.index_add(0, index, shifted), index, counts


def zero_without_signal(
    advantages: Float[Tensor, "batch completion"], rewards: Float[Tensor, "batch completion"]
) -> Float[Tensor, "batch completion"]:
    """The advantages, or 0 everywhere if every completion gets the same total reward.

    Equal rewards do not say which completion is better: the advantages are then only the error of
    the values, which whitening would scale up to standard deviation 1. A single completion has no
    signal if its total is 0.
    """
    totals = rewards.sum(dim=1)
    has_signal = (totals != (totals[0] if len(totals) > 1 else 0)).any()
    return masked_fill_zero(advantages, has_signal.expand_as(advantages))

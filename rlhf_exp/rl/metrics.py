"""Metrics of a phase from its samples and its minibatches."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_exp.functional.masking import masked_mean, masked_var
from rlhf_exp.types import Experience


def distinct_n(tokens: Int[Tensor, "batch completion"], mask: Bool[Tensor, "batch completion"],
               *, n: int) -> float:  # fmt: skip
    """Distinct n-grams of tokens divided by all of them, over the whole batch; 0 if there are none.

    It falls with the number of samples, so compare it at equal numbers only.
    """
    grams = [
        tuple(row[i : i + n])
        for row, real in zip(tokens.tolist(), mask.sum(dim=1).tolist(), strict=True)
        for i in range(real - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def explained_variance(
    values: Float[Tensor, "batch completion"],
    returns: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is perfect, 0 no better than a
    constant. 0 if the returns do not vary."""
    variance = masked_var(returns, mask)
    if variance == 0:
        return 0.0
    return float(1 - masked_var(returns - values, mask) / variance)


def read_metrics(rows: Iterable[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """Rows of equal metrics as numbers, copied from a GPU in one transfer."""
    rows = list(rows)
    names = list(rows[0])
    numbers = torch.stack([torch.stack([row[name] for name in names]) for row in rows]).tolist()
    return [dict(zip(names, row, strict=True)) for row in numbers]


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over rows of equal metrics."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def rollout_metrics(experience: Experience, *, truncates: bool) -> dict[str, float]:
    """Metrics of a rollout before learning from it. KL is exact, of the policy that sampled."""
    rollout, mask = experience.rollout, experience.rollout.completions.mask
    metrics = {
        "objective/scores": rollout.scores.mean().item(),
        "objective/scores_std": rollout.scores.std(correction=0).item(),
        "objective/kl": masked_mean(rollout.kl, mask).item(),
        "objective/kl_sum": rollout.kl.sum(dim=1).mean().item(),
        "objective/entropy": masked_mean(rollout.entropy, mask).item(),
        "sample/len_mean": mask.sum(dim=1).float().mean().item(),
        "sample/distinct_3": distinct_n(rollout.completions.tokens, mask, n=3),
    }
    if rollout.values is not None and experience.returns is not None:
        explained = explained_variance(rollout.values, experience.returns, mask)
        metrics["val/explained_variance"] = explained
    if truncates:
        metrics["sample/kept_mass"] = masked_mean(rollout.kept_mass, mask).item()
    return metrics

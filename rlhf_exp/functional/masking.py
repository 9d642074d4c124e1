"""Statistics over the real positions of padded tensors. Knows masks, not what they stand for.

The content of padding never changes a result, even NaN or infinity. A statistic over no real
position is 0.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def masked_fill_zero(x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"]) -> Tensor:
    """`x` with 0 where the mask is False; there the gradient is 0 too, never NaN."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"]) -> Float[Tensor, ""]:
    """Sum of `x` over the mask."""
    return masked_fill_zero(x, mask).sum()


def masked_mean(x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"]) -> Float[Tensor, ""]:
    """Mean of `x` over the mask; every real position has the same weight."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def sequence_mean(
    x: Float[Tensor, "batch completion"], mask: Bool[Tensor, "batch completion"]
) -> Float[Tensor, ""]:
    """Mean over rows of each row's mean over its mask; every row has the same weight. A row without
    real positions counts as 0."""
    sums = masked_fill_zero(x, mask).sum(dim=1)
    return (sums / mask.sum(dim=1).clamp(min=1)).mean()


def aggregate(
    x: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    aggregation: Aggregation,
) -> Float[Tensor, ""]:
    """One number from the tokens of a batch: token_mean, every token has the same weight;
    sequence_mean, every completion has, as in GRPO (Shao et al. 2024, arXiv 2402.03300); constant,
    the sum over real tokens divided by the number of positions, padding included, as in Dr. GRPO
    (Liu et al. 2025, arXiv 2503.20783). Raises ValueError for another name."""
    if aggregation == "token_mean":
        return masked_mean(x, mask)
    if aggregation == "sequence_mean":
        return sequence_mean(x, mask)
    if aggregation == "constant":
        return masked_sum(x, mask) / mask.numel()
    raise ValueError(
        f"aggregation={aggregation!r} must be one of token_mean, sequence_mean, constant"
    )


def masked_var(x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"]) -> Float[Tensor, ""]:
    """Unbiased variance (divided by n - 1) of `x` over the mask; 0 for fewer than two positions."""
    return _deviation(x, mask).square().sum() / (mask.sum() - 1).clamp(min=1)


def masked_whiten(
    x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"], *, eps: float = 1e-8
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the mask, 0 elsewhere; all 0 for a constant `x`.

    Source: OpenAI lm-human-preferences, `whiten` with shift_mean=True; here the variance is
    unbiased, as in TRL's masked_whiten.
    """
    scale = torch.rsqrt(masked_var(x, mask) + eps)
    return masked_fill_zero(_deviation(x, mask) * scale, mask)


def masked_rescale(
    x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"], *, eps: float = 1e-8
) -> Tensor:
    """Whitened to unit variance with its mean kept: (x - mean) / sqrt(var + eps) + mean.

    Source: lm-human-preferences, `whiten` with shift_mean=False; here too the variance is unbiased.
    """
    return masked_fill_zero(masked_whiten(x, mask, eps=eps) + masked_mean(x, mask), mask)


def _deviation(x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"]) -> Tensor:
    # The mean of a constant may round to another number, and whitening would magnify the
    # difference. After subtracting its first value a constant is exactly 0.
    from_first = x - x[mask][:1].sum().detach()
    return masked_fill_zero(from_first - masked_mean(from_first, mask), mask)

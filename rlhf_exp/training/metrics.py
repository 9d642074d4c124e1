"""Numbers computed from samples for people to read; nothing is trained on them."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_exp.functional.masking import masked_var


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


def mean_metrics(rows: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """The mean of each metric over rows that all have the same ones."""
    rows = list(rows)
    return {name: float(torch.stack([row[name] for row in rows]).mean()) for name in rows[0]}

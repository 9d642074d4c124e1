"""Filters on the distribution that tokens are sampled from. Knows logits, not generation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def filter_logits(
    logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Float[Tensor, "*batch vocab"]:
    """logits / temperature, with -inf for the tokens that the filters exclude.

    top_k keeps that many of the most probable tokens (None, or more than the vocabulary: all);
    top_p then keeps the smallest set of top tokens whose total probability is at least top_p.
    Raises ValueError for temperature <= 0, top_k < 1 or top_p outside (0, 1].
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0; for greedy decoding use top_k=1")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or null for no limit")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        top = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)
    if top_p < 1:
        ranked = logits.sort(dim=-1, descending=True)
        probs = ranked.values.softmax(dim=-1)
        mass_before = probs.cumsum(dim=-1) - probs
        filtered = ranked.values.masked_fill(mass_before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ranked.indices, filtered)
    return logits


def draw_tokens(
    probs: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """One token a row: the inverse of the cumulative distribution at `uniforms`, numbers in [0, 1).
    A token of probability 0 is never drawn.

    torch.multinomial draws a random number for each token of the vocabulary; here a row's token
    depends on one number and not on the other rows of the batch.
    """
    wide = torch.float32 if probs.device.type == "mps" else torch.float64
    cumulative = probs.cumsum(dim=-1, dtype=wide)
    total = cumulative[:, -1:]
    # Below the total even after rounding, so that the token has a probability above 0.
    threshold = torch.minimum(uniforms[:, None].to(wide) * total, total.nextafter(total * 0))
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return tokens.clamp(max=probs.shape[-1] - 1)  # out of range if probs are NaN: callers check

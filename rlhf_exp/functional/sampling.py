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
    """logits / temperature with -inf for the tokens that are never to be sampled.

    top_k keeps exactly that many (all, if the vocabulary is smaller; None keeps all); top_p then
    keeps the smallest set of the most probable ones whose mass reaches it, at least one.
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
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    if top_p < 1:
        ranked = logits.sort(dim=-1, descending=True)
        probs = ranked.values.softmax(dim=-1)
        mass_before = probs.cumsum(dim=-1) - probs
        kept_values = ranked.values.masked_fill(mass_before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ranked.indices, kept_values)
    return logits


def sample_tokens(
    filtered: Float[Tensor, "batch vocab"], generator: torch.Generator
) -> Int[Tensor, " batch"]:
    """One token a row from softmax(filtered), drawn with the generator."""
    return torch.multinomial(filtered.softmax(dim=-1), 1, generator=generator).squeeze(-1)

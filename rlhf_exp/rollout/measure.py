"""A generation beside the reference: exact KL, entropy and the reference's log-probs."""

import torch

from rlhf_exp.functional.logprobs import (
    completion_part,
    entropy,
    kl_divergence,
    token_logprobs,
)
from rlhf_exp.functional.masking import masked_fill_zero
from rlhf_exp.models.policy import CausalTransformer
from rlhf_exp.models.reference import Reference
from rlhf_exp.types import Generation, Rollout

# Rows whose [completion, vocab] logits are held at once: small against the batch, so that memory
# does not grow with it at large vocabularies.
ROWS = 16


@torch.no_grad()
def measure(
    policy: CausalTransformer,
    reference: Reference,
    generation: Generation,
    scores: torch.Tensor,
    *,
    temperature: float,
    rows: int | None = None,
) -> Rollout:
    """The rollout of a generation scored by `scores` [batch]. KL, entropy and log-probs are of the
    distributions at the temperature; padding holds 0. The reference reads `rows` sequences at a
    time, by default all."""
    completions = generation.completions
    tokens, mask = completions.sequences
    size = len(scores) if rows is None else rows
    ref_hidden = torch.cat(
        [
            completion_part(reference.hidden_states(*chunk), completions.prompt_len)
            for chunk in zip(tokens.split(size), mask.split(size), strict=True)
        ]
    )
    columns = []
    for index in torch.arange(len(scores), device=ref_hidden.device).split(ROWS):
        logits = policy.unembed(generation.hidden[index]).float() / temperature
        ref_logits = reference.unembed(ref_hidden[index]).float() / temperature
        columns.append(
            (
                token_logprobs(ref_logits, completions.tokens[index]),
                kl_divergence(logits, ref_logits),
                entropy(logits),
            )
        )
    ref_logprobs, kl, ent = (
        masked_fill_zero(torch.cat(column), completions.mask)
        for column in zip(*columns, strict=True)
    )
    return Rollout(
        completions=completions,
        logprobs=generation.logprobs,
        ref_logprobs=ref_logprobs,
        ref_hidden=masked_fill_zero(ref_hidden, completions.mask[..., None].expand_as(ref_hidden)),
        values=generation.values,
        kl=kl,
        entropy=ent,
        kept_mass=generation.kept_mass,
        scores=scores,
    )

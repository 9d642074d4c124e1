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
from rlhf_exp.types import Generation, Rollout

# Rows whose [completion, vocab] logits are held at once: small against the batch, so that memory
# does not grow with it at large vocabularies.
ROWS = 16


@torch.no_grad()
def measure(
    policy: CausalTransformer,
    reference: CausalTransformer,
    generation: Generation,
    scores: torch.Tensor,
    *,
    temperature: float,
) -> Rollout:
    """The rollout of a generation scored by `scores` [batch]. KL, entropy and log-probs are of the
    distributions at the temperature; padding holds 0."""
    completions = generation.completions
    ref_hidden = completion_part(
        reference.hidden_states(*completions.sequences), completions.prompt_len
    )
    columns = []
    for rows in torch.arange(len(scores), device=ref_hidden.device).split(ROWS):
        logits = policy.unembed(generation.hidden[rows]).float() / temperature
        ref_logits = reference.unembed(ref_hidden[rows]).float() / temperature
        columns.append(
            (
                token_logprobs(ref_logits, completions.tokens[rows]),
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

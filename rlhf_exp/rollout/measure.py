"""Measures a generation against the reference: exact KL, entropy, the reference's log-probs."""

import torch

from rlhf_exp.kernels.vocab_head import rollout_statistics
from rlhf_exp.models.reference import Reference
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.types import Generation, Layout, Rollout


@torch.no_grad()
def measure(
    policy: CausalTransformer,
    reference: Reference,
    generation: Generation,
    scores: torch.Tensor,
    *,
    temperature: float,
    rows: int | None = None,
    layout: Layout | None = None,
) -> Rollout:
    """The rollout of a generation with `scores` [batch]. KL, entropy and log-probs, in nats, are of
    the distributions at `temperature`; padding holds 0. The reference reads `rows` sequences at a
    time, by default all. `layout` is the layout of the completions."""
    completions = generation.completions
    layout = layout or Layout.of(completions)
    ref_hidden = torch.cat(
        [
            part.pick(reference.completion_states(completions[index.to(part.device)], part))
            for index in torch.arange(len(scores)).split(rows or len(scores))
            for part in [layout[index]]
        ]
    )
    with policy.autocast():
        statistics = rollout_statistics(
            layout.pick(generation.hidden),
            policy.head,
            layout.pick(completions.tokens),
            ref_hidden,
            reference.head,
            temperature=temperature,
        )
    return Rollout(
        completions=completions,
        logprobs=generation.logprobs,
        ref_logprobs=layout.spread(statistics.ref_logprobs),
        ref_hidden=layout.spread(ref_hidden),
        values=generation.values,
        kl=layout.spread(statistics.kl),
        entropy=layout.spread(statistics.entropy),
        kept_mass=generation.kept_mass,
        scores=scores,
    )

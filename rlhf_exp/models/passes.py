"""Passes of the policy over completions, with the KL to the reference: the fast one, and the
textbook's, which it must equal."""

import torch

from rlhf_exp.functional.logprobs import (
    completion_logits,
    completion_part,
    entropy,
    kl_divergence,
    token_logprobs,
)
from rlhf_exp.functional.vocab_head import token_statistics
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import Reference
from rlhf_exp.types import Layout, Pass, Rollout


def policy_pass(
    policy: TransformerWithValueHead,
    reference: Reference,
    rollout: Rollout,
    layout: Layout | None = None,
    *,
    temperature: float,
) -> Pass:
    """The pass that the policy's engine makes. `layout` is that of the completions."""
    if policy.engine == "hooked":
        return textbook_pass(policy, reference, rollout, temperature=temperature)
    layout = layout or Layout.of(rollout.completions)
    return fast_pass(policy, reference, rollout, layout, temperature=temperature)


def textbook_pass(
    policy: TransformerWithValueHead, reference: Reference, rollout: Rollout, *, temperature: float
) -> Pass:
    """Every logit of every position at once, as in the books: what `fast_pass` must equal."""
    completions = rollout.completions
    start = completions.prompt_len
    logits, values = policy(*completions.sequences)
    logits = completion_logits(logits, start).float() / temperature
    with torch.no_grad():
        ref_logits = reference.unembed(rollout.ref_hidden).float() / temperature
    return Pass(
        logprobs=token_logprobs(logits, completions.tokens),
        entropy=entropy(logits),
        kl=kl_divergence(logits, ref_logits),
        values=None if values is None else completion_part(values, start).float(),
    )


def fast_pass(
    policy: TransformerWithValueHead,
    reference: Reference,
    rollout: Rollout,
    layout: Layout,
    *,
    temperature: float,
) -> Pass:
    """Only what the losses need: a shared prompt once, no padding after the longest completion, and
    the head on real tokens, tile by tile of the vocabulary."""
    completions = rollout.completions
    with policy.learning_head() as head:
        hidden = layout.pick(policy.completion_states(completions, layout))
    with policy.autocast():
        statistics = token_statistics(
            hidden,
            head,
            layout.pick(completions.tokens),
            layout.pick(rollout.ref_hidden),
            reference.head,
            temperature=temperature,
        )
    values = policy.values(hidden)
    return Pass(
        logprobs=layout.spread(statistics.logprobs),
        entropy=layout.spread(statistics.entropy),
        kl=layout.spread(statistics.kl),
        values=None if values is None else layout.spread(values),
    )

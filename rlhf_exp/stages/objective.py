"""What PPO maximises, from a minibatch of experience to a loss with its terms."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.functional.logprobs import (
    completion_logits,
    completion_part,
    entropy,
    kl_divergence,
    kl_estimate,
    token_logprobs,
)
from rlhf_exp.functional.losses import (
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    value_loss,
)
from rlhf_exp.functional.masking import masked_mean
from rlhf_exp.functional.vocab_head import token_statistics
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import Reference
from rlhf_exp.settings import NonNegative, OpenFraction, Positive, settings
from rlhf_exp.types import Experience, Layout, LossOutput

# The metrics of a minibatch.
TERMS = (
    "loss/total", "loss/policy", "loss/value", "loss/kl", "loss/entropy", "policy/approxkl",
    "policy/clipfrac",
)  # fmt: skip


class Pass(NamedTuple):
    """What a pass of the policy over completions gives, with gradients; padding means nothing."""

    logprobs: Float[Tensor, "batch completion"]
    entropy: Float[Tensor, "batch completion"]
    kl: Float[Tensor, "batch completion"]
    values: Float[Tensor, "batch completion"]


@settings
class Objective:
    """Coefficients. Objective = clipped surrogate - vf_coef value loss + ent_coef entropy - kl_coef
    exact KL, the last only with kl_penalty="loss"."""

    clip_coef: OpenFraction = 0.2
    vf_coef: NonNegative = 0.15
    value_clip_coef: Positive | None = None
    ent_coef: NonNegative = 0.001
    kl_coef: NonNegative = 0.2
    kl_penalty: Literal["loss", "reward"] = "loss"

    def loss(
        self,
        policy: TransformerWithValueHead,
        reference: Reference,
        batch: Experience,
        *,
        temperature: float,
        layout: Layout | None = None,
        kl_coef: float | None = None,
    ) -> LossOutput:
        """Minus the objective of a minibatch, with its terms. `layout` is that of the batch,
        `kl_coef` by default the objective's own."""
        rollout, mask = batch.rollout, batch.rollout.completions.mask
        if policy.engine == "hooked":
            new = textbook_pass(policy, reference, batch, temperature=temperature)
        else:
            layout = layout or Layout.of(rollout.completions)
            new = fast_pass(policy, reference, batch, layout, temperature=temperature)
        surrogate = clipped_surrogate(
            new.logprobs, rollout.logprobs, batch.advantages, mask, clip_coef=self.clip_coef
        )
        value = self._value_loss(new.values, batch)
        kl, ent = masked_mean(new.kl, mask), masked_mean(new.entropy, mask)
        kl_coef = self.kl_coef if kl_coef is None else kl_coef
        kl_in_loss = kl_coef if self.kl_penalty == "loss" else 0.0
        objective = surrogate - self.vf_coef * value + self.ent_coef * ent - kl_in_loss * kl
        with torch.no_grad():
            approx_kl = kl_estimate(rollout.logprobs, new.logprobs, "k2")
            metrics = {
                "loss/total": -objective.detach(),
                "loss/policy": -surrogate.detach(),
                "loss/value": value.detach(),
                "loss/kl": kl.detach(),
                "loss/entropy": ent.detach(),
                "policy/approxkl": masked_mean(approx_kl, mask),
                "policy/clipfrac": clip_fraction(
                    new.logprobs, rollout.logprobs, mask, clip_coef=self.clip_coef
                ),
            }
        return LossOutput(loss=-objective, metrics=metrics, logprobs=new.logprobs.detach())

    def _value_loss(
        self, values: Float[Tensor, "batch completion"], batch: Experience
    ) -> Float[Tensor, ""]:
        mask = batch.rollout.completions.mask
        if self.value_clip_coef is None:
            return value_loss(values, batch.returns, mask)
        return clipped_value_loss(
            values, batch.rollout.values, batch.returns, mask,
            value_clip_coef=self.value_clip_coef,
        )  # fmt: skip


def textbook_pass(
    policy: TransformerWithValueHead,
    reference: Reference,
    batch: Experience,
    *,
    temperature: float,
) -> Pass:
    """Every logit of every position at once, as in the books: what `fast_pass` must equal."""
    completions = batch.rollout.completions
    start = completions.prompt_len
    logits, values = policy(*completions.sequences, prompt_len=start)
    logits = completion_logits(logits, start).float() / temperature
    with torch.no_grad():
        ref_logits = reference.unembed(batch.rollout.ref_hidden).float() / temperature
    return Pass(
        logprobs=token_logprobs(logits, completions.tokens),
        entropy=entropy(logits),
        kl=kl_divergence(logits, ref_logits),
        values=completion_part(values, start).float(),
    )


def fast_pass(
    policy: TransformerWithValueHead,
    reference: Reference,
    batch: Experience,
    layout: Layout,
    *,
    temperature: float,
) -> Pass:
    """Only what the losses need: a shared prompt once, no padding after the longest completion, and
    the head on real tokens, tile by tile of the vocabulary."""
    completions = batch.rollout.completions
    with policy.learning_head() as head:
        hidden = layout.pick(policy.completion_states(completions, layout))
    with policy.autocast():
        statistics = token_statistics(
            hidden,
            head,
            layout.pick(completions.tokens),
            layout.pick(batch.rollout.ref_hidden),
            reference.head,
            temperature=temperature,
        )
    columns = (*statistics, policy.values(hidden))
    return Pass(*(layout.spread(column) for column in columns))

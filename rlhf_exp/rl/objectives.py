"""Step 5's objective: from a pass over a minibatch to a loss with its terms.

An objective sees log-probs, KL, entropy and values. It does not know policy, reference, engine or
layout.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.functional.logprobs import kl_estimate
from rlhf_exp.functional.losses import (
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    policy_gradient,
    sequence_log_ratio,
    value_loss,
)
from rlhf_exp.functional.masking import Aggregation, aggregate, masked_fill_zero
from rlhf_exp.settings import AboveOne, Positive, settings
from rlhf_exp.types import Experience, LossOutput, Pass

Metrics = dict[str, Float[Tensor, ""]]


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """The stage's settings of these names, with `kl_coef` of the current phase; it is 0 where the
    KL is in the reward. `kl_term` is the KL in the loss: the exact one, or k3 from the sampled
    tokens."""

    clip_coef: float
    vf_coef: float
    value_clip_coef: float | None
    ent_coef: float
    kl_coef: float
    kl_term: Literal["exact", "k3"] = "exact"


@settings
class Objective(ABC):
    """The policy's term of the loss; `regularized` adds those of values, entropy and KL."""

    extra_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics of a minibatch beside those of `regularized`."""

    aggregation: Aggregation = "token_mean"
    """From tokens to a number, in each term of the loss: token_mean; sequence_mean, the mean of the
    completions' means (GRPO); constant, sum / (completions x sampler.gen_len) (Dr. GRPO)."""

    @abstractmethod
    def __call__(self, new: Pass, batch: Experience, coefs: Coefficients) -> LossOutput:
        """Minus the objective of a minibatch, with its terms."""

    def metric_names(self, *, with_values: bool) -> tuple[str, ...]:
        """The metrics of a minibatch."""
        values = ("loss/value",) if with_values else ()
        return (*TERMS, *values, *self.extra_metrics)


@settings
class PPOClip(Objective):
    """PPO's clipped surrogate."""

    extra_metrics: ClassVar[tuple[str, ...]] = ("policy/clipfrac",)

    clip_coef_high: Positive | None = None
    """The ratio is clipped to at most 1 + this (DAPO: 0.28); null: stage.clip_coef."""
    dual_clip_coef: AboveOne | None = None
    """A term of a negative advantage A is at least this times A, 2-5; null: no limit."""

    def __call__(self, new: Pass, batch: Experience, coefs: Coefficients) -> LossOutput:
        """functional.losses.clipped_surrogate, regularized."""
        old_logprobs, how = batch.rollout.logprobs, self.aggregation
        surrogate, clipped = _clipped(
            new.logprobs, old_logprobs, batch, coefs.clip_coef, self.clip_coef_high,
            self.dual_clip_coef, aggregation=how,
        )  # fmt: skip
        return regularized(surrogate, new, batch, coefs, clipped, aggregation=how)


@settings
class SequenceRatio(Objective):
    """PPO's clipped surrogate with one ratio a completion, the geometric mean of its tokens'
    ratios (GSPO)."""

    extra_metrics: ClassVar[tuple[str, ...]] = ("policy/clipfrac",)

    aggregation: Aggregation = "sequence_mean"
    """As in stage/objective=ppo_clip."""
    clip_coef_high: Positive | None = None
    """The ratio is clipped to at most 1 + this; null: stage.clip_coef."""

    def __call__(self, new: Pass, batch: Experience, coefs: Coefficients) -> LossOutput:
        """functional.losses.clipped_surrogate of functional.losses.sequence_log_ratio."""
        rollout, how = batch.rollout, self.aggregation
        log_ratio = sequence_log_ratio(new.logprobs, rollout.logprobs, rollout.completions.mask)
        of_tokens = log_ratio.expand_as(new.logprobs)
        surrogate, clipped = _clipped(
            of_tokens, torch.zeros_like(of_tokens), batch, coefs.clip_coef, self.clip_coef_high,
            aggregation=how,
        )  # fmt: skip
        return regularized(surrogate, new, batch, coefs, clipped, aggregation=how)


@settings
class PolicyGradient(Objective):
    """REINFORCE: the log-prob of each token times its advantage; nothing is clipped."""

    importance_cap: Positive | None = None
    """Each term is multiplied by the ratio to the policy that sampled, at most this, 1-5; null: no
    ratio, right for one pass and one minibatch."""

    def __call__(self, new: Pass, batch: Experience, coefs: Coefficients) -> LossOutput:
        """functional.losses.policy_gradient, regularized."""
        mask, old_logprobs = batch.rollout.completions.mask, batch.rollout.logprobs
        surrogate = policy_gradient(
            new.logprobs, old_logprobs, batch.advantages, mask,
            importance_cap=self.importance_cap, aggregation=self.aggregation,
        )  # fmt: skip
        return regularized(surrogate, new, batch, coefs, {}, aggregation=self.aggregation)


TERMS = ("loss/total", "loss/policy", "loss/kl", "loss/entropy", "policy/approxkl")


def mean_of(aggregation: Aggregation) -> Aggregation:
    """The mean that weights tokens as `aggregation` does: what is measured is not scaled by the
    share of padding."""
    return "token_mean" if aggregation == "token_mean" else "sequence_mean"


def regularized(
    surrogate: Float[Tensor, ""],
    new: Pass,
    batch: Experience,
    coefs: Coefficients,
    extra_metrics: Metrics,
    *,
    aggregation: Aggregation = "token_mean",
) -> LossOutput:
    """Minus (surrogate - vf_coef value loss + ent_coef entropy - kl_coef KL), each of them
    aggregated over real tokens. Without values there is no value loss."""
    rollout, mask = batch.rollout, batch.rollout.completions.mask
    objective, value_metrics = surrogate, {}
    if new.values is not None:
        value = _value_loss(new.values, batch, coefs.value_clip_coef, aggregation)
        objective = objective - coefs.vf_coef * value
        value_metrics = {"loss/value": value.detach()}
    token_kl = new.kl
    if coefs.kl_term == "k3":
        logprobs = masked_fill_zero(new.logprobs, mask)
        token_kl = kl_estimate(logprobs, rollout.ref_logprobs, "k3")
    kl, entropy = (aggregate(x, mask, aggregation) for x in (token_kl, new.entropy))
    objective = objective + coefs.ent_coef * entropy - coefs.kl_coef * kl
    with torch.no_grad():
        change = kl_estimate(rollout.logprobs, new.logprobs, "k2")
        approx_kl = aggregate(change, mask, mean_of(aggregation))
    terms = (-objective, -surrogate, kl, entropy, approx_kl)
    metrics = {name: term.detach() for name, term in zip(TERMS, terms, strict=True)}
    return LossOutput(loss=-objective, metrics={**metrics, **value_metrics, **extra_metrics})


def _clipped(
    logprobs: Float[Tensor, "batch completion"],
    old_logprobs: Float[Tensor, "batch completion"],
    batch: Experience,
    clip_coef: float,
    clip_coef_high: float | None,
    dual_clip_coef: float | None = None,
    *,
    aggregation: Aggregation,
) -> tuple[Float[Tensor, ""], Metrics]:
    """The clipped surrogate, and policy/clipfrac."""
    mask = batch.rollout.completions.mask
    surrogate = clipped_surrogate(
        logprobs, old_logprobs, batch.advantages, mask, clip_coef=clip_coef,
        clip_coef_high=clip_coef_high, dual_clip_coef=dual_clip_coef, aggregation=aggregation,
    )  # fmt: skip
    with torch.no_grad():
        clipped = clip_fraction(
            logprobs, old_logprobs, mask, clip_coef=clip_coef, clip_coef_high=clip_coef_high,
            aggregation=mean_of(aggregation),
        )  # fmt: skip
    return surrogate, {"policy/clipfrac": clipped}


def _value_loss(
    values: Float[Tensor, "batch completion"],
    batch: Experience,
    value_clip_coef: float | None,
    aggregation: Aggregation,
) -> Float[Tensor, ""]:
    mask, old_values = batch.rollout.completions.mask, batch.rollout.values
    assert batch.returns is not None
    if value_clip_coef is None:
        return value_loss(values, batch.returns, mask, aggregation=aggregation)
    assert old_values is not None
    return clipped_value_loss(
        values, old_values, batch.returns, mask,
        value_clip_coef=value_clip_coef, aggregation=aggregation,
    )  # fmt: skip

"""Step 5's objective: from a pass over a minibatch to a loss with its terms.

An objective sees log-probs, KL, entropy and values. It does not know policy, reference, engine or
layout.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.functional.logprobs import kl_estimate
from rlhf_exp.functional.losses import (
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    value_loss,
)
from rlhf_exp.functional.masking import masked_mean
from rlhf_exp.settings import settings
from rlhf_exp.types import Experience, LossOutput, Pass

Metrics = dict[str, Float[Tensor, ""]]


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """The stage's settings of these names, with `kl_coef` of the current phase; it is 0 where the
    KL is in the reward."""

    clip_coef: float
    vf_coef: float
    value_clip_coef: float | None
    ent_coef: float
    kl_coef: float


@settings
class Objective(ABC):
    """The policy's term of the loss; `regularized` adds those of values, entropy and KL."""

    extra_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics of a minibatch beside those of `regularized`."""

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

    def __call__(self, new: Pass, batch: Experience, coefs: Coefficients) -> LossOutput:
        """functional.losses.clipped_surrogate, regularized."""
        mask, old_logprobs = batch.rollout.completions.mask, batch.rollout.logprobs
        clip_coef = coefs.clip_coef
        surrogate = clipped_surrogate(
            new.logprobs, old_logprobs, batch.advantages, mask, clip_coef=clip_coef
        )
        with torch.no_grad():
            clipped = clip_fraction(new.logprobs, old_logprobs, mask, clip_coef=clip_coef)
        return regularized(surrogate, new, batch, coefs, {"policy/clipfrac": clipped})


TERMS = ("loss/total", "loss/policy", "loss/kl", "loss/entropy", "policy/approxkl")


def regularized(
    surrogate: Float[Tensor, ""],
    new: Pass,
    batch: Experience,
    coefs: Coefficients,
    extra_metrics: Metrics,
) -> LossOutput:
    """Minus (surrogate - vf_coef value loss + ent_coef entropy - kl_coef exact KL), each of them a
    mean over real tokens. Without values there is no value loss."""
    mask = batch.rollout.completions.mask
    objective, value_metrics = surrogate, {}
    if new.values is not None:
        value = _value_loss(new.values, batch, coefs.value_clip_coef)
        objective = objective - coefs.vf_coef * value
        value_metrics = {"loss/value": value.detach()}
    kl, entropy = masked_mean(new.kl, mask), masked_mean(new.entropy, mask)
    objective = objective + coefs.ent_coef * entropy - coefs.kl_coef * kl
    with torch.no_grad():
        approx_kl = masked_mean(kl_estimate(batch.rollout.logprobs, new.logprobs, "k2"), mask)
    terms = (-objective, -surrogate, kl, entropy, approx_kl)
    metrics = {name: term.detach() for name, term in zip(TERMS, terms, strict=True)}
    return LossOutput(loss=-objective, metrics={**metrics, **value_metrics, **extra_metrics})


def _value_loss(
    values: Float[Tensor, "batch completion"], batch: Experience, value_clip_coef: float | None
) -> Float[Tensor, ""]:
    mask, old_values = batch.rollout.completions.mask, batch.rollout.values
    assert batch.returns is not None
    if value_clip_coef is None:
        return value_loss(values, batch.returns, mask)
    assert old_values is not None
    return clipped_value_loss(
        values, old_values, batch.returns, mask, value_clip_coef=value_clip_coef
    )

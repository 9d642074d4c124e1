"""Step 4, credit: from a scored rollout to the advantage of each token.

An estimator knows one formula. It does not know where the scores come from or how its
advantages are used.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_exp.functional.advantages import (
    best_of_groups,
    equal_groups,
    gae,
    group_normalized,
    leave_one_out,
    normalize_reward,
    terminal_rewards,
    zero_without_signal,
)
from rlhf_exp.functional.logprobs import kl_estimate
from rlhf_exp.functional.masking import masked_fill_zero, masked_whiten
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import BelowOne, Fraction, settings
from rlhf_exp.types import Experience, Rollout

KLPenalty = Literal["loss", "loss_k3", "reward", "return"]


def token_rewards(
    rollout: Rollout, *, kl_coef: float, kl_penalty: KLPenalty, normalize: bool
) -> Float[Tensor, "batch completion"]:
    """The score at the last token of each completion, normalised over the batch if `normalize`,
    minus what `kl_penalty` charges at every token.

    reward: kl_coef (log p - log q), the k1 estimate of the KL. return: kl_coef times the exact KL,
    which does not depend on the token emitted there: it gives credit to earlier tokens alone, and
    the loss has the rest of the gradient. loss, loss_k3: nothing.
    """
    mask = rollout.completions.mask
    scores = normalize_reward(rollout.scores) if normalize else rollout.scores
    rewards = terminal_rewards(scores, mask)
    if kl_penalty == "reward":
        return rewards - kl_coef * kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")
    if kl_penalty == "return":
        return rewards - kl_coef * rollout.kl
    return rewards


@settings
class Estimator(ABC):
    """A formula for advantages."""

    needs_values: ClassVar[bool] = False
    """True: the policy gets a value head, which learns the returns."""
    min_samples_per_prompt: ClassVar[int] = 1
    """The smallest stage.samples_per_prompt that the formula is defined for."""
    remembers: ClassVar[bool] = False
    """True: the call takes a third argument, a dictionary of numbers that the run keeps from phase
    to phase and saves in its checkpoints."""

    @property
    def to_keep_scale(self) -> str | None:
        """What to change so that advantages have the scale of the rewards, and a term of the loss
        can be weighed against them; None if they have it."""
        return None

    @abstractmethod
    def __call__(self, rollout: Rollout, rewards: Float[Tensor, "batch completion"]) -> Experience:
        """The experience of a rollout with these token rewards; advantages are 0 in the padding."""

    def metrics(self, experience: Experience) -> dict[str, float]:
        """Metrics of a phase; by default none."""
        return {}

    def for_minibatch(self, minibatch: Experience) -> Experience:
        """Transforms a minibatch before its loss; by default nothing changes."""
        return minibatch


def credit(
    estimator: Estimator,
    rollout: Rollout,
    rewards: Float[Tensor, "batch completion"],
    memory: dict[str, float],
) -> Experience:
    """Step 4; `memory` is for an estimator that remembers. Raises TrainingError naming an estimator
    whose output breaks its declaration."""
    remembered = (memory,) if estimator.remembers else ()
    experience = estimator(rollout, rewards, *remembered)
    is_whole = isinstance(experience, Experience)
    if not is_whole or (experience.returns is not None) != estimator.needs_values:
        returns = "with returns" if estimator.needs_values else "with returns=None"
        raise TrainingError(
            f"{type(estimator).__name__} has needs_values={estimator.needs_values}, so that it must"
            f" return an Experience {returns}"
        )
    return experience


@settings
class BestOfGroup(Estimator):
    """An advantage of 1 for the completion of the highest total reward of each prompt; learning
    leaves out the others, and all completions of a prompt if their rewards are equal. With
    stage/objective=policy_gradient the loss is that of supervised training on the best (RAFT)."""

    min_samples_per_prompt: ClassVar[int] = 2

    @property
    def to_keep_scale(self) -> str | None:
        return "choose another estimator"

    def __call__(self, rollout: Rollout, rewards: Float[Tensor, "batch completion"]) -> Experience:
        """The best by functional.advantages.best_of_groups, and no returns."""
        totals, groups = rewards.sum(dim=1), rollout.groups
        is_best = best_of_groups(totals, groups)
        return _one_advantage(rollout, rewards, torch.ones_like(totals), learned=is_best)

    def metrics(self, experience: Experience) -> dict[str, float]:
        """As of GroupNormalized."""
        return _equal_fraction(experience)


@settings
class GAE(Estimator):
    """Generalised advantage estimation from a learned value of each token."""

    needs_values: ClassVar[bool] = True

    gamma: Fraction = 1.0
    """Discount per token, 0-1."""
    gae_lambda: Fraction = 0.95
    """0: one-step advantages; 1: return minus value."""
    whiten_advantages: Literal["batch", "minibatch", "none"] = "batch"
    """To mean 0 and standard deviation 1: over the whole rollout, within each minibatch, or not."""

    @property
    def to_keep_scale(self) -> str | None:
        return None if self.whiten_advantages == "none" else "set estimator.whiten_advantages=none"

    def __call__(self, rollout: Rollout, rewards: Float[Tensor, "batch completion"]) -> Experience:
        """Advantages by functional.advantages.gae; returns are advantages plus values, before any
        whitening. If all rewards are equal, advantages are 0 and only the values learn."""
        assert rollout.values is not None
        values, mask = rollout.values, rollout.completions.mask
        advantages = gae(values, rewards, mask, gamma=self.gamma, gae_lambda=self.gae_lambda)
        returns = advantages + values
        if self.whiten_advantages == "batch":
            advantages = masked_whiten(advantages, mask)
        advantages = zero_without_signal(advantages, rewards)
        return Experience(rollout=rollout, rewards=rewards, advantages=advantages, returns=returns)

    def for_minibatch(self, minibatch: Experience) -> Experience:
        if self.whiten_advantages != "minibatch":
            return minibatch
        whitened = masked_whiten(minibatch.advantages, minibatch.rollout.completions.mask)
        return replace(minibatch, advantages=zero_without_signal(whitened, minibatch.rewards))


@settings
class GroupNormalized(Estimator):
    """Each completion's total reward minus the mean of its prompt's completions, divided by their
    standard deviation; all of its tokens have the same advantage (GRPO)."""

    min_samples_per_prompt: ClassVar[int] = 2

    scale: Literal["std", "none"] = "std"
    """std: divided by the group's standard deviation; none: only centred (Dr. GRPO)."""
    equal_groups: Literal["keep", "leave_out"] = "keep"
    """Groups whose scores are all equal, which do not say what is better. keep: they count in the
    loss's means; leave_out: learning leaves them out (DAPO)."""

    @property
    def to_keep_scale(self) -> str | None:
        return None if self.scale == "none" else "set estimator.scale=none"

    def __call__(self, rollout: Rollout, rewards: Float[Tensor, "batch completion"]) -> Experience:
        """Advantages by functional.advantages.group_normalized, and no returns."""
        totals, groups = rewards.sum(dim=1), rollout.groups
        advantages = group_normalized(totals, groups, scale=self.scale)
        learned = None
        if self.equal_groups == "leave_out":
            learned = ~equal_groups(rollout.scores, groups)
        return _one_advantage(rollout, rewards, advantages, learned=learned)

    def metrics(self, experience: Experience) -> dict[str, float]:
        """groups/equal_fraction: the fraction of completions whose group has equal scores."""
        return _equal_fraction(experience)


@settings
class Reinforce(Estimator):
    """Each completion's total reward minus a baseline; all of its tokens have the same advantage
    (Williams 1992)."""

    remembers: ClassVar[bool] = True

    baseline: Literal["none", "batch_mean", "running_mean"] = "batch_mean"
    """none; the batch's mean; or the running mean of earlier batches' means, which needs
    stage.normalize_reward=false."""
    decay: BelowOne = 0.9
    """Weight of the running mean so far beside a new batch's mean, 0-0.99."""

    def __call__(
        self,
        rollout: Rollout,
        rewards: Float[Tensor, "batch completion"],
        memory: dict[str, float] | None = None,
    ) -> Experience:
        """The running mean is memory["mean"]; the first batch's own mean is its baseline."""
        totals = rewards.sum(dim=1)
        advantages = totals
        if self.baseline == "batch_mean":
            advantages = totals - totals.mean()
        elif self.baseline == "running_mean":
            assert memory is not None
            mean = totals.mean().item()
            before = memory.get("mean", mean)
            advantages = totals - before
            if not math.isnan(mean):  # a phase whose reward failed
                memory["mean"] = self.decay * before + (1 - self.decay) * mean
        return _one_advantage(rollout, rewards, advantages)


@settings
class LeaveOneOut(Estimator):
    """Each completion's total reward minus the mean of the other completions of its prompt; all of
    its tokens have the same advantage."""

    min_samples_per_prompt: ClassVar[int] = 2

    def __call__(self, rollout: Rollout, rewards: Float[Tensor, "batch completion"]) -> Experience:
        """Advantages by functional.advantages.leave_one_out, and no returns."""
        advantages = leave_one_out(rewards.sum(dim=1), rollout.groups)
        return _one_advantage(rollout, rewards, advantages)


def _equal_fraction(experience: Experience) -> dict[str, float]:
    equal = equal_groups(experience.rollout.scores, experience.rollout.groups)
    return {"groups/equal_fraction": equal.float().mean().item()}


def _one_advantage(
    rollout: Rollout,
    rewards: Float[Tensor, "batch completion"],
    advantages: Float[Tensor, " batch"],
    *,
    learned: Bool[Tensor, " batch"] | None = None,
) -> Experience:
    """The experience in which all tokens of a completion have its advantage."""
    mask = rollout.completions.mask
    spread = masked_fill_zero(advantages[:, None].expand(mask.shape), mask)
    return Experience(
        rollout=rollout, rewards=rewards, advantages=spread, returns=None, learned=learned
    )

"""A reward that is the weighted sum of other rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.models.reference import Reference
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.rewards.protocol import (
    ReadsPrompts,
    ReadsTokens,
    RewardFunction,
    is_scored_by_reference,
)
from rlhf_exp.settings import Fingerprinted, Real, settings
from rlhf_exp.types import Completions


@settings
class Term:
    """A reward and its weight in the sum."""

    weight: Real
    reward: Any


@settings
class WeightedSum:
    """The sum of each term's reward times its weight."""

    terms: Annotated[dict[str, Term], Field(min_length=1)]
    """The rewards by name, each with its weight, any number."""

    def fingerprint(self) -> str:
        """A hash of the files that the terms read, "" for none."""
        rewards = [term.reward for term in self.terms.values()]
        hashes = [r.fingerprint() for r in rewards if isinstance(r, Fingerprinted)]
        return " ".join(filter(None, hashes))

    def check_policy(
        self, tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool, num_tokens: int
    ) -> None:
        """Raises ConfigError if one of the terms cannot read the policy's samples."""
        for term in self.terms.values():
            if isinstance(term.reward, ReadsTokens):
                term.reward.check_policy(tokenizer, prepend_bos=prepend_bos, num_tokens=num_tokens)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ConfigError if one of the terms cannot read the prompts."""
        for term in self.terms.values():
            if isinstance(term.reward, ReadsPrompts):
                term.reward.check_prompts(prompts)

    @property
    def uses_reference(self) -> bool:
        """True if the run's reference computes one of the terms."""
        return any(is_scored_by_reference(term.reward) for term in self.terms.values())

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function of the sum; loads every term."""
        return self._total([term.reward.load(device) for term in self.terms.values()])

    def load_with_reference(
        self, policy: CausalTransformer, reference: Reference
    ) -> RewardFunction:
        """The reward function of the sum; loads every term, some with the reference."""
        rewards = [term.reward for term in self.terms.values()]
        return self._total(
            [
                reward.load_with_reference(policy, reference)
                if is_scored_by_reference(reward)
                else reward.load(policy.device)
                for reward in rewards
            ]
        )

    def _total(self, functions: Sequence[RewardFunction]) -> "SumOfRewards":
        return SumOfRewards(
            terms=dict(zip(self.terms, functions, strict=True)),
            weights=[term.weight for term in self.terms.values()],
        )


@dataclass(frozen=True, kw_only=True)
class SumOfRewards:
    """The reward function of a sum, which also tells the terms' own scores."""

    terms: dict[str, RewardFunction]
    weights: Sequence[float]

    def __call__(self, completions: Completions) -> Float[Tensor, " batch"]:
        """The sum of the terms' scores times their weights."""
        return self.combine(self.stack(completions))

    def stack(self, completions: Completions) -> Float[Tensor, "term batch"]:
        """The score of each term, without its weight."""
        return torch.stack([reward(completions) for reward in self.terms.values()])

    def combine(self, scores: Float[Tensor, "term batch"]) -> Float[Tensor, " batch"]:
        """The sum of the terms' scores times their weights."""
        return torch.stack(
            [weight * row for weight, row in zip(self.weights, scores, strict=True)]
        ).sum(dim=0)

"""Rewards without a signal, for control runs: what a policy learns from them is noise."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.models.reference import Reference
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.rewards.protocol import RewardFunction, TextReward
from rlhf_exp.rewards.weighted_sum import Term, WeightedSum
from rlhf_exp.settings import Index, settings
from rlhf_exp.types import Completions


@settings
class Zero(TextReward):
    """0 for every completion."""

    def score(self, text: str) -> float:
        """0."""
        return 0.0


@settings
class Shuffled:
    """The scores of another reward in a random order within each batch. Their distribution, and so
    the mean score, is the reward's; which completion has which is chance."""

    of: Any
    """The reward whose scores are shuffled."""
    seed: Index = 0
    """Draws the orders; any integer from 0."""

    def fingerprint(self) -> str:
        """A hash of the files that the reward reads, "" for none."""
        return self._sum.fingerprint()

    def check_policy(
        self, tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool, num_tokens: int
    ) -> None:
        """Raises ConfigError if the reward cannot read the policy's samples."""
        self._sum.check_policy(tokenizer, prepend_bos=prepend_bos, num_tokens=num_tokens)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ConfigError if the reward cannot read the prompts."""
        self._sum.check_prompts(prompts)

    @property
    def uses_reference(self) -> bool:
        """True if the run's reference computes the reward."""
        return self._sum.uses_reference

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function."""
        return self._shuffled(self._sum.load(device))

    def load_with_reference(
        self, policy: CausalTransformer, reference: Reference
    ) -> RewardFunction:
        """The reward function, which the reference computes."""
        return self._shuffled(self._sum.load_with_reference(policy, reference))

    @property
    def _sum(self) -> WeightedSum:
        """The reward as a sum of one term, which asks it what it can do."""
        return WeightedSum(terms={"of": Term(weight=1.0, reward=self.of)})

    def _shuffled(self, reward: RewardFunction) -> RewardFunction:
        def scores(completions: Completions) -> Float[Tensor, " batch"]:
            ordered = reward(completions)
            order = self._order(completions.full_texts)
            return ordered[order.to(ordered.device)]

        return scores

    def _order(self, texts: Sequence[str]) -> Tensor:
        """An order that the texts decide, so that a resumed run or a second attempt has the same
        one: a count of calls would have to be saved."""
        digest = hashlib.sha256(repr((self.seed, *texts)).encode("utf-8", "backslashreplace"))
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "big"))
        return torch.randperm(len(texts), generator=generator)

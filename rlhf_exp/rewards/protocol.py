"""The protocol of rewards: settings that load a function from completions to scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.models.reference import Reference
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.types import Completions

RewardFunction = Callable[[Completions], Float[Tensor, " batch"]]


class RewardError(TrainingError):
    """A reward returned no usable scores; the message names the cause and the sample."""

    exit_code = 2


@runtime_checkable
class Reward(Protocol):
    """The settings of a reward group."""

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function, with its models on the device. Raises ConfigError if a model is
        missing or does not fit the settings."""
        ...


@runtime_checkable
class ReadsTokens(Protocol):
    """A reward that reads the policy's tokens and so must share its vocabulary."""

    def check_policy(
        self, tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool, num_tokens: int
    ) -> None:
        """Raises ConfigError if it cannot read samples of a policy with this tokenizer, whose
        prompts begin with BOS if `prepend_bos`. A prompt and completion have at most `num_tokens`
        tokens."""
        ...


@runtime_checkable
class ReadsPrompts(Protocol):
    """A reward that parses the prompt."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ConfigError naming the first prompt that it cannot read."""
        ...


@runtime_checkable
class UsesReference(Protocol):
    """A reward that the run's frozen reference may compute."""

    @property
    def uses_reference(self) -> bool:
        """True if the reference computes it; `load_with_reference` then replaces `load`."""
        ...

    def load_with_reference(
        self, policy: CausalTransformer, reference: Reference
    ) -> RewardFunction:
        """The reward function; `policy` owns the tokenizer and what the reference shares."""
        ...


def is_scored_by_reference(reward: Any) -> bool:
    """Returns True if the reward is computed by the run's frozen reference."""
    return isinstance(reward, UsesReference) and reward.uses_reference


class TextReward(ABC):
    """A reward that scores each text by itself. Subclasses are settings with a `score`."""

    @abstractmethod
    def score(self, text: str) -> float:
        """The score of one text: a prompt followed by its completion."""

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function; it returns fp32 scores on the device."""
        return lambda completions: torch.tensor(
            [self.score(text) for text in completions.full_texts],
            dtype=torch.float32,
            device=device,
        )

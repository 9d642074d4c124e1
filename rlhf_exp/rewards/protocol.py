"""What a reward is: settings that load into a function from completions to one score each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.types import Completions

RewardFunction = Callable[[Completions], Float[Tensor, " batch"]]


class RewardError(TrainingError):
    """A reward that gave no usable scores: the message names the cause and the sample."""

    exit_code = 2


@runtime_checkable
class Reward(Protocol):
    """The settings of a reward group."""

    def load(self, device: torch.device) -> RewardFunction:
        """The function, whatever it needs loaded to the device. Raises ConfigError for a model that
        is not there or lacks what is asked."""
        ...


@runtime_checkable
class ReadsTokens(Protocol):
    """A reward that reads the policy's own tokens, and so must share its vocabulary."""

    def check_policy(
        self, tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool, num_tokens: int
    ) -> None:
        """Raises ConfigError if it cannot read what a policy with this tokenizer writes after
        prompts that begin with BOS, or do not: `num_tokens` at most, prompt and completion."""
        ...


@runtime_checkable
class ReadsPrompts(Protocol):
    """A reward that takes what it needs to know from the prompt."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ConfigError naming the first prompt that it cannot read."""
        ...


class TextReward(ABC):
    """A reward that judges each text by itself. Subclasses are settings with a `score`."""

    @abstractmethod
    def score(self, text: str) -> float:
        """The score of one text, the prompt with its completion."""

    def load(self, device: torch.device) -> RewardFunction:
        """The scores of all texts as an fp32 tensor on the device."""
        return lambda completions: torch.tensor(
            [self.score(text) for text in completions.full_texts],
            dtype=torch.float32,
            device=device,
        )

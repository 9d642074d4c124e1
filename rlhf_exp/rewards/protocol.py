"""What a reward is: settings that load into a function from completions to one score each."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.types import Completions

RewardFunction = Callable[[Completions], Float[Tensor, " batch"]]


@runtime_checkable
class Reward(Protocol):
    """The settings of a reward group."""

    def load(self, device: torch.device) -> RewardFunction:
        """The function, whatever it needs loaded to the device. Raises ConfigError for a model that
        is not there or lacks what is asked."""
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

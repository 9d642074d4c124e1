"""Several rewards as one."""

from typing import Annotated, Any

import torch
from pydantic import Field

from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.settings import Real, settings
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

    def load(self, device: torch.device) -> RewardFunction:
        """The sum's function, every term loaded."""
        functions = [(term.weight, term.reward.load(device)) for term in self.terms.values()]

        def total(completions: Completions) -> torch.Tensor:
            return torch.stack([weight * f(completions) for weight, f in functions]).sum(dim=0)

        return total

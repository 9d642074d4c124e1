"""A reward for completions of a target length."""

import torch

from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.settings import Count, settings


@settings
class Length:
    """-|length - target| / target, in tokens with end-of-sequence: 0 at the target, -1 for an empty
    completion."""

    target_tokens: Count = 16
    """Tokens of the completion, end-of-sequence included."""

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function; loads nothing."""
        target = self.target_tokens
        return lambda completions: -((completions.mask.sum(dim=1) - target).abs() / target)

"""How long a completion is."""

import torch

from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.settings import Count, settings


@settings
class Length:
    """Minus the distance of a completion's length from the target, in units of the target: 0 at
    the target, -1 for an empty one. Tokens are counted, end-of-sequence included."""

    target_tokens: Count = 16
    """Tokens of the completion, end-of-sequence included."""

    def load(self, device: torch.device) -> RewardFunction:
        """The function; nothing is loaded."""
        target = self.target_tokens
        return lambda completions: -((completions.mask.sum(dim=1) - target).abs() / target)

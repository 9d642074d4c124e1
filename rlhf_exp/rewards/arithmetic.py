"""The true reward of arithmetic series, computed from the prompt."""

from collections.abc import Sequence

import torch

from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.settings import ConfigError, settings
from rlhf_exp.tasks.arithmetic import parse_answer, parse_prompt, series_reward
from rlhf_exp.types import Completions


@settings
class ArithmeticReward:
    """`tasks.arithmetic.series_reward` of each completion, from 1 to 7. Its function raises
    ValueError for a prompt that is not from task=arithmetic."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ConfigError naming the first prompt that is not from task=arithmetic."""
        for prompt in prompts:
            try:
                parse_prompt(prompt)
            except ValueError as error:
                raise ConfigError(f"reward=arithmetic: {error}") from error

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function; loads nothing."""

        def score(completions: Completions) -> torch.Tensor:
            exact = (parse_prompt(prompt).series() for prompt in completions.prompts.texts)
            answers = map(parse_answer, completions.texts)
            rewards = [series_reward(e, a) for e, a in zip(exact, answers, strict=True)]
            return torch.tensor(rewards, dtype=torch.float32, device=device)

        return score

"""A reward that counts a character."""

from typing import Annotated

from pydantic import Field

from rlhf_exp.rewards.protocol import TextReward
from rlhf_exp.settings import settings


@settings
class CharCount(TextReward):
    """The number of times that a character occurs in prompt and completion; with "." the reward of
    ARENA's exercise on periods."""

    character: Annotated[str, Field(min_length=1, max_length=1)] = "."
    """One character."""

    def score(self, text: str) -> float:
        """The count."""
        return float(text.count(self.character))

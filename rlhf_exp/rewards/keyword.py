"""A reward that counts keywords."""

import re
from typing import Annotated

from pydantic import Field

from rlhf_exp.rewards.protocol import TextReward
from rlhf_exp.settings import Count, Text, settings


@settings
class Keyword(TextReward):
    """The number of whole words that match a keyword, ignoring case, at most `max_count`."""

    keywords: Annotated[list[Text], Field(min_length=1)]
    """Words or phrases."""
    max_count: Count = 1
    """Most occurrences that count."""

    def score(self, text: str) -> float:
        """The capped count."""
        pattern = "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in self.keywords)
        return float(min(self.max_count, len(re.findall(pattern, text, flags=re.IGNORECASE))))

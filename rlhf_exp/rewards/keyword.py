"""Whether, or how often, given words occur."""

import re
from typing import Annotated

from pydantic import Field

from rlhf_exp.rewards.protocol import TextReward
from rlhf_exp.settings import Count, Text, settings


@settings
class Keyword(TextReward):
    """Occurrences of the keywords as whole words, case ignored, at most `max_count` of them."""

    keywords: Annotated[list[Text], Field(min_length=1)]
    """Words or phrases."""
    max_count: Count = 1
    """Further occurrences add nothing."""

    def score(self, text: str) -> float:
        """The capped count."""
        pattern = "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in self.keywords)
        return float(min(self.max_count, len(re.findall(pattern, text, flags=re.IGNORECASE))))

"""A reward for answers of an exact number of sentences."""

import re

import torch

from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.settings import Count, settings
from rlhf_exp.types import Completions

# A full stop, question or exclamation mark, with closing quotes, before a space or the end.
END = re.compile(r"""[.!?]+["')\]]*(?=\s|$)""")


@settings
class Sentences:
    """1 for a completion of exactly `count` sentences, the last one complete, on one line; else 0.

    A sentence ends with . ! or ? before a space or the end, so "e.g. this" counts as two. A list
    is no sentence: a completion with a line break scores 0.
    """

    count: Count = 3
    """Sentences."""

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function; loads nothing."""

        def score(completions: Completions) -> torch.Tensor:
            follows = [num_sentences(text) == self.count for text in completions.texts]
            return torch.tensor(follows, dtype=torch.float32, device=device)

        return score


def num_sentences(text: str) -> int | None:
    """The number of sentences of a text on one line; None if the last one is not complete or the
    text has several lines."""
    text = text.strip()
    ends = [match.end() for match in END.finditer(text)]
    if "\n" in text or not ends or ends[-1] != len(text):
        return None
    return len(ends)

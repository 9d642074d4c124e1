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
    """1 for a completion of exactly `count` sentences, the last one complete, on one line; 0 for
    other completions, or part of 1 with `partial`.

    A sentence ends with . ! or ? before a space or the end, so "e.g. this" counts as two. A list
    is no sentence: a completion with a line break scores 0.
    """

    count: Count = 3
    """Sentences."""
    partial: bool = False
    """true: other numbers of sentences score 1 - |number - count| / count, at least 0; a rule that
    is almost never followed at first is learned from these."""

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function; loads nothing."""

        def score(completions: Completions) -> torch.Tensor:
            scores = [self._score(num_sentences(text)) for text in completions.texts]
            return torch.tensor(scores, device=device)

        return score

    def _score(self, number: int | None) -> float:
        if number is None or not self.partial:
            return float(number == self.count)
        return max(0.0, 1 - abs(number - self.count) / self.count)


def num_sentences(text: str) -> int | None:
    """The number of sentences of a text on one line; None if the last one is not complete or the
    text has several lines."""
    text = text.strip()
    ends = [match.end() for match in END.finditer(text)]
    if "\n" in text or not ends or ends[-1] != len(text):
        return None
    return len(ends)

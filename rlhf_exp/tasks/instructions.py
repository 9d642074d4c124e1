"""Eighty short instructions as conversations, each followed by a rule on the answer's form.

Knows the instructions, not whether an answer follows the rule: a reward does.
"""

from pathlib import Path

import yaml

from rlhf_exp.settings import Text, settings
from rlhf_exp.tasks.protocol import PromptRow

NUM_HELD_OUT = 16


@settings
class Instructions:
    """Instructions to an assistant; 64 to train on and 16 held out."""

    rule: Text = "Answer in exactly three sentences."
    """What follows each instruction: the rule that the reward checks."""

    @property
    def prepend_bos(self) -> None:
        """The chat template decides."""

    def fingerprint(self) -> str:
        """Nothing is read but this package's own list."""
        return ""

    def train_prompts(self) -> tuple[PromptRow, ...]:
        """The first 64 instructions."""
        return self._prompts()[:-NUM_HELD_OUT]

    def eval_prompts(self) -> tuple[PromptRow, ...]:
        """The last 16 instructions."""
        return self._prompts()[-NUM_HELD_OUT:]

    def _prompts(self) -> tuple[PromptRow, ...]:
        file = Path(__file__).with_suffix(".yaml")
        instructions = yaml.safe_load(file.read_text(encoding="utf-8"))
        return tuple(
            PromptRow([{"role": "user", "content": f"{instruction} {self.rule}"}], {})
            for instruction in instructions
        )

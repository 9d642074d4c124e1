"""One text that every completion continues; for models and rewards that come from elsewhere.

It knows no corpus, no labels and no tokenizer.
"""

from rlhf_exp.settings import Text, settings


@settings
class Prefix:
    """The same prompt for training and evaluation."""

    prefix: Text = "This is"  # the text that is continued
    prepend_bos: bool = True  # whether a prompt begins with the tokenizer's BOS token

    def fingerprint(self) -> str:
        """The empty string: no files are read."""
        return ""

    def train_prompts(self) -> tuple[str, ...]:
        """The prefix alone."""
        return (self.prefix,)

    def eval_prompts(self) -> tuple[str, ...]:
        """The prefix alone."""
        return (self.prefix,)

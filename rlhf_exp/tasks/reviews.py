"""Short film reviews from a grammar: texts, labels and one prompt, without a download.

Knows the numbers, splits and labels of reviews; review_grammar knows their words.
"""

import random
from collections.abc import Iterator
from itertools import islice

from pydantic import field_validator

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.settings import ConfigError, Count, Fraction, Index, Text, settings
from rlhf_exp.tasks.protocol import LabelledText, Split
from rlhf_exp.tasks.review_grammar import draw_review, vocabulary


@settings
class Reviews:
    """Film reviews of 26 to 40 tokens from a closed vocabulary; a quarter begins with the default
    prefix.

    Reviews are distinct within a split. Classifier and language model use different random streams.
    Held-out reviews are drawn first, so they do not depend on the counts.
    """

    prefix: Text = "this movie was really"
    """Text that PPO's completions continue; 1 to 8 words of the grammar."""
    prepend_bos: bool = True
    """Whether a prompt begins with <bos>; true, as in the corpus."""
    num_reviews: Count = 32000
    """Reviews to train the language model on; 10000 to 100000."""
    num_labelled: Count = 6000
    """Pos and neg reviews to train the classifier on; 1000 to 20000."""
    num_held_out: Count = 1000
    """Reviews held out for each of the two; 200 to 5000."""
    label_noise: Fraction = 0.02
    """Probability that a training label is flipped; 0 to 0.1, caps P(pos) at 1 - it."""
    data_seed: Index = 0
    """Draws the reviews; any integer from 0."""

    @field_validator("prefix")
    @classmethod
    def _check_prefix(cls, prefix: str) -> str:
        unknown = sorted(set(prefix.split(" ")) - set(vocabulary()))
        if unknown:
            raise ConfigError(
                f"task.prefix={prefix!r} holds {unknown}, which no review does: use words of "
                "rlhf_exp/tasks/review_grammar.yaml, lower-case, with single spaces between"
            )
        return prefix

    def fingerprint(self) -> str:
        """The empty string: no files are read."""
        return ""

    def train_prompts(self) -> tuple[str, ...]:
        """The prefix."""
        return (self.prefix,)

    def eval_prompts(self) -> tuple[str, ...]:
        """The prefix."""
        return (self.prefix,)

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer with one token for each word of the grammar."""
        from rlhf_exp.tasks.tokenizers import word_tokenizer

        return word_tokenizer(vocabulary())

    def language_split(self) -> Split[str]:
        """Positive, negative and neutral reviews, a third each."""
        drawn = self._draw("language", ("pos", "neg", "neutral"))
        reviews = (review.text for review in drawn)
        held_out = tuple(islice(reviews, self.num_held_out))
        return Split(train=tuple(islice(reviews, self.num_reviews)), held_out=held_out)

    def labelled_split(self) -> Split[LabelledText]:
        """Reviews labelled "pos" and "neg", half each; held-out labels are always right."""
        reviews = self._draw("labelled", ("pos", "neg"))
        held_out = tuple(islice(reviews, self.num_held_out))
        noise = random.Random(f"{self.data_seed} noise")
        flipped = {"pos": "neg", "neg": "pos"}
        train = tuple(
            LabelledText(flipped[label] if noise.random() < self.label_noise else label, text)
            for label, text in islice(reviews, self.num_labelled)
        )
        return Split(train=train, held_out=held_out)

    def _draw(self, stream: str, labels: tuple[str, ...]) -> Iterator[LabelledText]:
        """Endless distinct reviews."""
        rng = random.Random(f"{self.data_seed} {stream}")
        drawn: set[str] = set()
        while True:
            label = rng.choice(labels)
            text = draw_review(label, rng)
            if text not in drawn:
                drawn.add(text)
                yield LabelledText(label, text)

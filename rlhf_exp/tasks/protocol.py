"""What a task offers to the stages: prompts, and where it has them, texts and labels.

A task knows its data; it knows no model and no tokens but for the tokenizer that it builds.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from rlhf_exp.hf import PreTrainedTokenizerBase


class LabelledText(NamedTuple):
    """A text and its label."""

    label: str
    text: str


class Split(NamedTuple):
    """Labelled texts to train on and texts that no stage trains on, disjoint."""

    train: tuple[LabelledText, ...]
    held_out: tuple[LabelledText, ...]


@runtime_checkable
class Task(Protocol):
    """Prompts for PPO. Every task is at least this."""

    @property
    def prepend_bos(self) -> bool:
        """Whether a prompt begins with BOS."""
        ...

    def fingerprint(self) -> str:
        """A hash of the files that the task reads, "" for none. Raises ConfigError for a file
        that is missing or malformed, so that a bad one is found before anything is built."""
        ...

    def train_prompts(self) -> tuple[str, ...]:
        """The texts that PPO samples from while it learns."""
        ...

    def eval_prompts(self) -> tuple[str, ...]:
        """The texts that evaluations sample from; disjoint from `train_prompts` where the task
        has more than one."""
        ...


@runtime_checkable
class CorpusTask(Task, Protocol):
    """A task that a language model and a classifier can be trained on from nothing."""

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer for the texts, the same one at every call. It has BOS, EOS and PAD, pads on
        the left and adds no special tokens by itself."""
        ...

    def language_split(self) -> Split:
        """The texts that a language model is trained on, and held-out ones."""
        ...

    def labelled_split(self) -> Split:
        """The texts that a classifier is trained on, and held-out ones."""
        ...

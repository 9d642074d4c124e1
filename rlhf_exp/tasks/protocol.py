"""What a task offers to the stages: prompts, and where it has them, texts, labels, demonstrations,
exact answers or preference pairs.

A task knows its data; it knows no model and no tokens but for the tokenizer that it builds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from rlhf_exp.hf import PreTrainedTokenizerBase

T = TypeVar("T")

# Messages with a "role" and a "content", the last of them not the assistant's.
Conversation = Sequence[Mapping[str, str]]


class PromptRow(NamedTuple):
    """A prompt with the further columns of its dataset, which rewards may read."""

    prompt: str | Conversation
    columns: Mapping[str, Any]


Prompt = str | PromptRow


class LabelledText(NamedTuple):
    """A text and its label."""

    label: str
    text: str


class Demonstration(NamedTuple):
    """A prompt and the answer to imitate, which begins with whatever separates it from the prompt
    and does not hold the end-of-sequence token."""

    prompt: str
    response: str


class Pair(NamedTuple):
    """Two answers to one prompt, the better one first, as text without special tokens.

    The rewards are None where only the order is known. An answer that was cut off before its
    end-of-sequence token has not ended.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    chosen_ended: bool = True
    rejected_ended: bool = True


@dataclass(frozen=True)
class Split(Generic[T]):
    """What is trained on and what no stage trains on, disjoint; unpacks as these two."""

    train: tuple[T, ...]
    held_out: tuple[T, ...]

    def __iter__(self) -> Iterator[tuple[T, ...]]:
        return iter((self.train, self.held_out))


@runtime_checkable
class Task(Protocol):
    """Prompts for PPO. Every task is at least this."""

    @property
    def prepend_bos(self) -> bool | None:
        """Whether a prompt that is a text begins with BOS; None: if the tokenizer puts one before
        texts by itself. A conversation begins as its chat template does."""
        ...

    def fingerprint(self) -> str:
        """A hash of the files that the task reads, "" for none. Raises ConfigError for a file
        that is missing or malformed, so that a bad one is found before anything is built."""
        ...

    def train_prompts(self) -> tuple[Prompt, ...]:
        """What PPO samples from while it learns."""
        ...

    def eval_prompts(self) -> tuple[Prompt, ...]:
        """What evaluations sample from; disjoint from `train_prompts` where the task
        has more than one."""
        ...


@runtime_checkable
class ShapesPrompts(Protocol):
    """A task that chooses or cuts its prompts by their tokens."""

    def shape_prompt(self, row: PromptRow, ids: Sequence[int]) -> Sequence[int] | None:
        """The tokens to keep of a prompt's, BOS included, or None to leave the prompt out."""
        ...


@runtime_checkable
class CorpusTask(Task, Protocol):
    """A task that a language model can be trained on from nothing."""

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer for the texts, the same one at every call. It has EOS and PAD, and BOS if
        prompts begin with it; it pads on the left and adds no special tokens by itself."""
        ...

    def language_split(self) -> Split[str]:
        """The texts that a language model is trained on, and held-out ones."""
        ...


@runtime_checkable
class LabelledTask(CorpusTask, Protocol):
    """A task that a classifier can be trained on."""

    def labelled_split(self) -> Split[LabelledText]:
        """The texts that a classifier is trained on, and held-out ones."""
        ...


@runtime_checkable
class DemonstrationTask(Task, Protocol):
    """A task with answers to imitate."""

    def demonstration_split(self) -> Split[Demonstration]:
        """The demonstrations that a language model is trained on, and held-out ones, whose prompts
        are neither in the first nor in `eval_prompts`."""
        ...


@runtime_checkable
class AnswerTask(Task, Protocol):
    """A task that knows the one exact answer to each of its prompts, and how good another is."""

    def answer(self, prompt: str) -> str:
        """The exact answer, as a demonstration's response."""
        ...

    def true_reward(self, prompt: str, completion: str) -> float:
        """How good a completion is; the highest for the exact answer."""
        ...


@runtime_checkable
class PairTask(Task, Protocol):
    """A task with preference pairs."""

    def pair_split(self) -> Split[Pair]:
        """The pairs that a reward model is trained on, and held-out ones; no prompt is in both
        unless there are too few prompts."""
        ...

    def sources(self) -> Split[str]:
        """Where each pair of `pair_split` comes from, for messages."""
        ...

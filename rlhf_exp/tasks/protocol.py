"""The protocols of tasks: prompts, and optionally texts, labels, demonstrations, exact answers or
preference pairs.

A task knows its data, but no model, and no tokens except those of a tokenizer that it builds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from rlhf_exp.hf import PreTrainedTokenizerBase

T = TypeVar("T")

# Messages with a "role" and a "content"; the last is not the assistant's.
Conversation = Sequence[Mapping[str, str]]


class PromptRow(NamedTuple):
    """A prompt with the other columns of its dataset, which rewards may read."""

    prompt: str | Conversation
    columns: Mapping[str, Any]


Prompt = str | PromptRow


class LabelledText(NamedTuple):
    """A text and its label."""

    label: str
    text: str


class Demonstration(NamedTuple):
    """A prompt and the answer to imitate. The answer includes the space that separates it from the
    prompt, but not the end-of-sequence token."""

    prompt: str
    response: str


class Pair(NamedTuple):
    """Two answers to one prompt, the better one first, as text without special tokens; the answer
    to a conversation is the content of the assistant's next message.

    The rewards are None if only the order is known. An answer without its end-of-sequence token has
    not ended.
    """

    prompt: str | Conversation
    chosen: str
    rejected: str
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    chosen_ended: bool = True
    rejected_ended: bool = True


@dataclass(frozen=True)
class Split(Generic[T]):
    """Training data and held-out data, which are disjoint; unpacks into the two."""

    train: tuple[T, ...]
    held_out: tuple[T, ...]

    def __iter__(self) -> Iterator[tuple[T, ...]]:
        return iter((self.train, self.held_out))


@runtime_checkable
class Task(Protocol):
    """Prompts for PPO. Every task implements this."""

    @property
    def prepend_bos(self) -> bool | None:
        """Whether a text begins with BOS; None: if the tokenizer adds one by itself. A conversation
        begins as its chat template says."""
        ...

    def fingerprint(self) -> str:
        """A hash of the files that the task reads, "" for none. Raises ConfigError for a missing or
        malformed file; it is called before anything is built."""
        ...

    def train_prompts(self) -> tuple[Prompt, ...]:
        """The prompts that PPO trains on."""
        ...

    def eval_prompts(self) -> tuple[Prompt, ...]:
        """The prompts of evaluations; disjoint from `train_prompts` if the task has several."""
        ...


@runtime_checkable
class ShapesPrompts(Protocol):
    """A task that drops or cuts its prompts by their tokens."""

    def shape_prompt(self, row: PromptRow, ids: Sequence[int]) -> Sequence[int] | None:
        """The tokens of a prompt to use, BOS included; None drops the prompt."""
        ...


@runtime_checkable
class CorpusTask(Task, Protocol):
    """A task with texts to train a language model on from scratch."""

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer for the texts, equal at every call. It has EOS and PAD, and BOS if prompts
        begin with it; it pads on the left and adds no special tokens by itself."""
        ...

    def language_split(self) -> Split[str]:
        """Training and held-out texts of a language model."""
        ...


@runtime_checkable
class LabelledTask(CorpusTask, Protocol):
    """A task with labelled texts to train a classifier on."""

    def labelled_split(self) -> Split[LabelledText]:
        """Training and held-out texts of a classifier."""
        ...


@runtime_checkable
class DemonstrationTask(Task, Protocol):
    """A task with answers to imitate."""

    def demonstration_split(self) -> Split[Demonstration]:
        """Training and held-out demonstrations; no held-out prompt is in the training part or in
        `eval_prompts`."""
        ...


@runtime_checkable
class AnswerTask(Task, Protocol):
    """A task with one exact answer to each prompt, and a reward for any other answer."""

    def answer(self, prompt: str) -> str:
        """The exact answer, in the form of a demonstration's response."""
        ...

    def true_reward(self, prompt: str, completion: str) -> float:
        """The reward of a completion; highest for the exact answer."""
        ...


@runtime_checkable
class PairTask(Task, Protocol):
    """A task with preference pairs."""

    def pair_split(self) -> Split[Pair]:
        """Training and held-out pairs of a reward model; no prompt is in both unless there are too
        few prompts."""
        ...

    def sources(self) -> Split[str]:
        """The place of each pair of `pair_split`, for messages."""
        ...

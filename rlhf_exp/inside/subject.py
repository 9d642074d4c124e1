"""A run to look inside, with what several measures read: its models, samples of its policy, and
texts that have nothing to do with its reward."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from rlhf_exp.inside.loading import Pair, TrainedRun
from rlhf_exp.inside.token_classes import TokenClasses, token_classes
from rlhf_exp.rl.collect import sample
from rlhf_exp.rl.eval_text import as_completions, encode_known
from rlhf_exp.rl.evaluation import evaluation_order
from rlhf_exp.rl.setup import load_prompts
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.encoding import encode, leading_ids
from rlhf_exp.tasks.prompts import take
from rlhf_exp.tasks.protocol import CorpusTask, Task
from rlhf_exp.training.seeding import make_generator
from rlhf_exp.types import Completions, PromptBatch, concatenate

T = TypeVar("T")
Track = Callable[[Sequence[Any], str], Iterable[Any]]  # shows the progress through items
NEUTRAL_FILE = Path(__file__).with_name("neutral.txt")
NEUTRAL_LEN = 64  # most tokens of a neutral text
ROWS = 32  # samples at a time


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts to compare models on, as completions, and what they are."""

    source: str
    completions: Completions


def no_progress(items: Sequence[T], what: str) -> Iterable[T]:
    """The items; shows nothing."""
    return items


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run and the phase to look at (None: its end). `track` shows the progress through a list of
    things that take time."""

    run: TrainedRun
    phase: int | None = None
    num_samples: int = 128
    track: Track = no_progress

    @cached_property
    def pair(self) -> Pair:
        """The models before and after."""
        tuned = self.run.tuned(self.phase)
        return Pair(base=self.run.base(), tuned=tuned)

    def load(self) -> None:
        """Loads the models. Raises ConfigError as `TrainedRun` does."""
        _ = self.pair

    @cached_property
    def task(self) -> Task:
        """The run's task. Raises ConfigError if it has none, or none with prompts."""
        task = self.run.part("task")
        if not isinstance(task, Task):
            raise ConfigError("its task has no prompts")
        return task

    @cached_property
    def classes(self) -> TokenClasses:
        """The classes of the vocabulary's tokens."""
        vocab_size = self.pair.base.head.weight.shape[0]
        return token_classes(self.pair.base.tokenizer, vocab_size)

    @cached_property
    def own_samples(self) -> Texts:
        """Fresh completions by the tuned policy of the run's held-out prompts, in the order of its
        evaluations but with other random numbers, at temperature 1 from the full distribution."""
        sampler, policy = self.run.part("sampler"), self.pair.tuned
        if not isinstance(sampler, Sampler):
            raise ConfigError("it has no sampler")
        _, held_out = load_prompts(policy, self.task, sampler)
        order = evaluation_order(held_out, self.run.seed)
        index = order.repeat(-(-self.num_samples // len(order)))[: self.num_samples]
        draw = functools.partial(sample, sampler.full_distribution, policy, phase=self.phase or 0)
        generator = make_generator(self.run.seed, "inside", policy.device)
        parts = [
            draw(take(held_out, rows.to(policy.device)), generator).completions
            for rows in self.track(index.split(ROWS), "sampling")
        ]
        return Texts(source="held-out prompts", completions=join(parts))

    @cached_property
    def neutral_texts(self) -> Texts:
        """Texts about other things: this package's, or held-out texts of the task if the tokenizer
        knows few other words. Raises ConfigError without any."""
        policy = self.pair.base
        texts, source = NEUTRAL_FILE.read_text(encoding="utf-8").splitlines(), "neutral.txt"
        rows = encode_known(policy, texts)
        if rows is None:
            if not isinstance(self.task, CorpusTask):
                raise ConfigError("its tokenizer does not know the words of neutral texts")
            texts = list(self.task.language_split().held_out[: self.num_samples])
            source = "held-out texts of the task"
            rows = [ids for ids in encode(policy.tokenizer, texts) if len(ids) > 1]
        prepend_bos = True if policy.tokenizer.bos_token_id is not None else None
        leading = leading_ids(policy.tokenizer, prepend_bos=prepend_bos)
        limit = min(NEUTRAL_LEN, policy.context_len - (len(leading) or 1))
        return Texts(source=source, completions=as_completions(policy, rows, leading, limit=limit))


def join(parts: Sequence[Completions]) -> Completions:
    """One record of all rows; prompts are padded on the left and completions on the right."""
    prompt_len = max(part.prompts.tokens.shape[1] for part in parts)
    length = max(part.tokens.shape[1] for part in parts)

    def padded(x: torch.Tensor, left: int, right: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (left, right))

    widened = [
        Completions(
            prompts=PromptBatch(
                tokens=padded(part.prompts.tokens, prompt_len - part.prompts.tokens.shape[1], 0),
                mask=padded(part.prompts.mask, prompt_len - part.prompts.mask.shape[1], 0),
                rows=part.prompts.rows,
            ),
            tokens=padded(part.tokens, 0, length - part.tokens.shape[1]),
            mask=padded(part.mask, 0, length - part.mask.shape[1]),
            texts=part.texts,
        )
        for part in parts
    ]
    return concatenate(widened)

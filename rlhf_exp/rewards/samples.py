"""Samples as plain lists for a user's functions and servers, and the check of their scores.

Knows the lists that TRL passes to reward functions, not how a scorer is called. Refuses scores that
are not one finite number for each sample.
"""

import copy
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.rewards.protocol import RewardError
from rlhf_exp.types import Completions

# Keys of a row that are not columns of its dataset.
PROMPT_KEYS = ("prompt", "messages")
FP32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples as lists with one entry each: texts, or lists of messages for a conversation. `first`
    is the index of the first sample in its batch. Error messages quote `text_pairs`, so a scorer
    that changes the lists does not change them."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    text_pairs: tuple[tuple[str, str], ...]
    first: int = 0

    def __len__(self) -> int:
        return len(self.text_pairs)

    def part(self, start: int, stop: int) -> "Samples":
        """The samples from `start` up to `stop`."""
        return Samples(
            prompts=self.prompts[start:stop],
            completions=self.completions[start:stop],
            completion_ids=self.completion_ids[start:stop],
            columns={name: entries[start:stop] for name, entries in self.columns.items()},
            text_pairs=self.text_pairs[start:stop],
            first=self.first + start,
        )

    def show(self, index: int) -> str:
        """The index of a sample in its batch, from 0, with its prompt and completion, shortened."""
        prompt, completion = map(cut, self.text_pairs[index])
        return f"samples[{self.first + index}]: prompt {prompt}, completion {completion}"


def to_samples(completions: Completions) -> Samples:
    """The batch as lists that share no memory with it: a scorer may change them."""
    rows = completions.prompts.rows
    tokens, mask = completions.tokens.cpu(), completions.mask.cpu()
    return Samples(
        prompts=[
            copy.deepcopy(row["messages"]) if _is_conversation(row) else row["prompt"]
            for row in rows
        ],
        completions=[
            [{"role": "assistant", "content": text}] if _is_conversation(row) else text
            for row, text in zip(rows, completions.texts, strict=True)
        ],
        completion_ids=[row[row_mask].tolist() for row, row_mask in zip(tokens, mask, strict=True)],
        columns=_columns(rows),
        text_pairs=tuple(zip(completions.prompts.texts, completions.texts, strict=True)),
    )


def _is_conversation(row: Mapping[str, Any]) -> bool:
    return row.get("messages") is not None


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row if name not in PROMPT_KEYS)
    return {name: [copy.deepcopy(row.get(name)) for row in rows] for name in names}


def read_scores(values: Any, samples: Samples, *, who: str) -> list[float]:
    """A scorer's result as floats. Raises RewardError that begins with `who` and shows a sample
    unless the result is a flat list, tuple, array or tensor of one finite number for each
    sample."""
    entries = _entries(values)
    if entries is None:
        raise RewardError(
            f"{who} gave {_name(values)} instead of scores; it must give a list of numbers, one for"
            f" each sample\n{samples.show(0)}"
        )
    if len(entries) != len(samples):
        raise RewardError(
            f"{who} gave {len(entries)} scores for {len(samples)} samples; it must give one for"
            f" each, the first for\n{samples.show(0)}"
        )
    scores = [_score(entry) for entry in entries]
    bad = [index for index, score in enumerate(scores) if score is None]
    if bad:
        raise RewardError(
            f"{who} gave {reprlib.repr(entries[bad[0]])} as scores[{samples.first + bad[0]}]"
            f" ({len(bad)} such of {len(entries)}); every score must be a finite number in fp32\n"
            + samples.show(bad[0])
        )
    return [score for score in scores if score is not None]


def _entries(values: Any) -> list[Any] | None:
    if isinstance(values, list | tuple):
        return list(values)
    if isinstance(values, Tensor | np.ndarray) and values.ndim == 1:
        return values.tolist()
    return None


def _name(values: Any) -> str:
    if isinstance(values, Tensor | np.ndarray):
        return f"{type(values).__name__} of shape {tuple(values.shape)}"
    return "None" if values is None else f"{type(values).__name__} {reprlib.repr(values)}"


def _score(entry: Any) -> float | None:
    if isinstance(entry, Tensor | np.ndarray | np.generic) and entry.ndim == 0:
        entry = entry.item()
    if not isinstance(entry, Real):
        return None
    try:
        score = float(entry)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return score if math.isfinite(score) and abs(score) <= FP32_MAX else None


def cut(text: str, limit: int = 100) -> str:
    """The text in quotes, without its middle if it is longer than `limit`."""
    short = reprlib.Repr()
    short.maxstring = limit
    return short.repr(text)

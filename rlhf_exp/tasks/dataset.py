"""Prompts from a dataset: from the Hugging Face hub, or JSON Lines, Parquet, CSV or text files.

Knows `datasets` and TRL's standard and conversational formats. Refuses an ambiguous row, naming
the row and the field.
"""

import hashlib
import logging
import reprlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from pydantic import model_validator

from rlhf_exp.settings import ConfigError, Count, Fraction, Index, Text, is_reference, settings
from rlhf_exp.tasks.conversations import ANSWERS, prompt_key, read_message
from rlhf_exp.tasks.hashing import hash_fraction, split_by_keys
from rlhf_exp.tasks.protocol import Conversation, Prompt, PromptRow, Split
from rlhf_exp.tasks.tables import Source, read_table
from rlhf_exp.tasks.text_files import check_unicode

log = logging.getLogger(__name__)

COLUMNS = ("prompt", "text", "messages")


@settings
class PromptDataset:
    """Prompts from the first existing column of `prompt`, `text` and `messages`: texts, or
    conversations as lists of messages with role and content, without their last answers. Rewards
    get all other columns, except another one named prompt or messages.

    Texts of fewer than min_chars characters are dropped, and prompts of fewer than min_tokens or
    more than max_tokens tokens. With first_tokens_max only the first tokens of a text are used: a
    random number between first_tokens_min and first_tokens_max, BOS included, or all if it has
    fewer. Evaluations use a `held_out_fraction` of the distinct prompts, at least one, or the
    prompts of `eval_split` that are not trained on.
    """

    path: Text
    """Hub name, or a .jsonl, .json, .parquet, .csv, .tsv or .txt file, or a directory of such
    files."""
    subset: Text | None = None
    """Configuration of a dataset that has several, such as main or en; null: its only one."""
    split: Text = "train"
    """Split of the dataset, or a slice such as train[:1000]; a single file has only train."""
    eval_split: Text | None = None
    """Split to evaluate on, such as test or train[:500]; null: held_out_fraction."""
    revision: Text | None = None
    """Branch, tag or commit of the hub's repository."""
    column: Text | None = None
    """The column with the prompts, texts or lists of messages; null: prompt, text or messages."""
    prepend_bos: bool | None = None
    """Whether a text begins with BOS; null: if the tokenizer adds one by itself."""
    min_tokens: Count = 1
    """Shorter prompts are dropped; in tokens, with BOS and chat template."""
    max_tokens: Count | None = None
    """Longer prompts are dropped; at most the context minus sampler.gen_len."""
    min_chars: Index = 0
    """Shorter texts are dropped, in characters; 1 drops blank and missing ones, 0 refuses them."""
    first_tokens_min: Count | None = None
    """With first_tokens_max: the fewest first tokens of a text to use, BOS included; 2 to 64."""
    first_tokens_max: Count | None = None
    """The most of them; the number is drawn for each text; null: the whole text."""
    max_prompts: Count | None = None
    """Number of rows of a split to use, chosen at random; null: all."""
    held_out_fraction: Fraction = 0.1
    """Fraction of the prompts for evaluation; 0: evaluate on the training prompts."""
    data_seed: Index = 0
    """Draws the order, the held-out prompts and the first tokens; any integer from 0."""

    @model_validator(mode="after")
    def _ordered(self) -> "PromptDataset":
        for least, most in (("min_tokens", "max_tokens"), ("first_tokens_min", "first_tokens_max")):
            a, b = getattr(self, least), getattr(self, most)
            if a is not None and b is not None and a > b:
                raise ValueError(f"{least}={a} is above {most}={b}: lower it or raise {most}")
        if (self.first_tokens_min is None) != (self.first_tokens_max is None):
            raise ValueError("first_tokens_min and first_tokens_max: set both, or both null")
        return self

    def fingerprint(self) -> str:
        """The SHA-256 of the prompts and their columns in hexadecimal digits; "" for an artifact of
        an earlier step.

        Raises ConfigError if the dataset cannot be read as described or leaves no prompts for
        training or for evaluation.
        """
        if is_reference(self.path):
            return ""
        digest = hashlib.sha256()
        for part in self._split:
            for row in part:
                digest.update(repr(row).encode())
            digest.update(b"end of the part")
        return digest.hexdigest()

    def train_prompts(self) -> tuple[Prompt, ...]:
        """The prompts that are not held out, in random order."""
        return self._split.train

    def eval_prompts(self) -> tuple[Prompt, ...]:
        """The held-out prompts, none of them in `train_prompts`; with held_out_fraction=0 the
        training prompts."""
        return self._split.held_out

    def shape_prompt(self, row: PromptRow, ids: Sequence[int]) -> Sequence[int] | None:
        """The first tokens of the prompt, or all; None if there are too few or too many."""
        if not self.min_tokens <= len(ids) <= (self.max_tokens or len(ids)):
            return None
        if self.first_tokens_min is None or self.first_tokens_max is None:
            return ids
        # From a hash of the text, so that a prompt does not change when others are added.
        draw = hash_fraction(f"first tokens {self.data_seed} {row.prompt}")
        num_choices = self.first_tokens_max - self.first_tokens_min + 1
        return ids[: self.first_tokens_min + int(draw * num_choices)]

    @cached_property
    def _split(self) -> Split[Prompt]:
        rows = self._read(self.split, "task.split")
        if self.eval_split is not None:
            train_keys = {_key(row) for row in rows}
            others = self._read(self.eval_split, "task.eval_split")
            held_out = tuple(row for row in others if _key(row) not in train_keys)
            if not held_out:
                raise ConfigError(
                    f"task.eval_split={self.eval_split}: {self.path} has no prompt there that is"
                    f" not in {self.split} too"
                )
            return Split(tuple(rows), held_out)
        if self.held_out_fraction == 0:
            return Split(tuple(rows), tuple(rows))
        # By the prompt: equal ones stay together, and none moves when others are added.
        keys = [f"{self.data_seed} {_key(row)}" for row in rows]
        split: Split[Prompt] = split_by_keys(rows, keys, self.held_out_fraction)
        if not split.train:
            raise ConfigError(
                f"task.held_out_fraction={self.held_out_fraction} leaves none of the {len(rows)}"
                f" prompts of {self.path} to train on: lower it, name an eval_split, or set it 0 to"
                " evaluate on the training prompts"
            )
        log.info(
            "task.held_out_fraction=%g: %d of %d distinct prompts are held out",
            self.held_out_fraction, len({*map(_key, split.held_out)}), len({*keys}),
        )  # fmt: skip
        return split

    def _read(self, split: str, split_field: str) -> list[PromptRow]:
        source = Source(
            path=self.path,
            subset=self.subset,
            split=split,
            revision=self.revision,
            text_columns=self._candidates,
            split_field=split_field,
        )
        table = read_table(source)
        column = self._column(table.column_names)
        # Shuffled by position, so that rows are read only until there are max_prompts.
        order = sorted(
            range(table.num_rows), key=lambda i: hash_fraction(f"order {self.data_seed} {i}")
        )
        rows: list[PromptRow] = []
        for number, row in table.rows(order):
            if self.max_prompts is not None and len(rows) == self.max_prompts:
                break
            if self._is_short(row[column]):
                continue
            where = f"{self.path}, {split}, row {number}"
            prompt = _prompt(row[column], f"task.path: {where}: {column}")
            if self.first_tokens_max is not None and not isinstance(prompt, str):
                raise ConfigError(
                    f"task.first_tokens_max={self.first_tokens_max} cuts texts, but {where} is a"
                    " conversation: set it and task.first_tokens_min null"
                )
            rows.append(PromptRow(prompt, {k: v for k, v in row.items() if k != column}))
        if not rows:
            raise ConfigError(
                f"task.min_chars={self.min_chars}: {self.path} has no prompt of that length in"
                f" {split} ({table.num_rows} rows); lower it"
            )
        return rows

    def _is_short(self, value: Any) -> bool:
        """Returns True if a text is too short to keep. Blank and missing texts count as 0
        characters."""
        if value is not None and not isinstance(value, str):
            return False
        return (len(value) if value and value.strip() else 0) < self.min_chars

    @property
    def _candidates(self) -> tuple[str, ...]:
        return COLUMNS if self.column is None else (self.column,)

    def _column(self, names: Sequence[str]) -> str:
        for name in self._candidates:
            if name in names:
                return name
        candidates = "prompt, text or messages" if self.column is None else self.column
        raise ConfigError(
            f"task.path: {self.path} has no column {candidates}; it has {', '.join(names)}: set"
            " task.column to the one with the prompts"
        )


def _prompt(value: Any, what: str) -> str | Conversation:
    """A row's prompt: a text, or messages without the assistant's last ones. Raises ConfigError
    for one that is blank or malformed."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ConfigError(f"{what} is blank; fill it in, or set task.min_chars=1 to drop such rows")
    if isinstance(value, str):
        return check_unicode(value, what)
    if not isinstance(value, list):
        raise ConfigError(f"{what} is {reprlib.repr(value)}; give a text or a list of messages")
    messages = list(value)
    while messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") == ANSWERS:
        messages.pop()
    if not messages:
        raise ConfigError(f"{what} has no message before the assistant's; add a user's message")
    read = [read_message(message, what) for message in messages]
    if not read[-1]["content"].strip():
        raise ConfigError(f"{what} ends with a blank message; fill it in or remove the row")
    return read


def _key(row: Prompt) -> str:
    return prompt_key(row.prompt if isinstance(row, PromptRow) else row)

"""Reads preference pairs from files, and writes them to files that `datasets` and TRL read.

Knows files and splits, not the columns of a row.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from rlhf_exp.settings import ConfigError, Index, OpenFraction, Text, is_reference, settings
from rlhf_exp.tasks.conversations import prompt_key
from rlhf_exp.tasks.hashing import split_by_keys
from rlhf_exp.tasks.pair_formats import TEXTS, pair_row, read_pair
from rlhf_exp.tasks.protocol import Pair, Prompt, PromptRow, Split
from rlhf_exp.tasks.tables import Source, read_table

FORMATS = ("jsonl", "parquet")
Format = Literal["jsonl", "parquet"]
FOLDER = "pairs"
MIN_PAIRS, MANY_PROMPTS = 20, 10


T = TypeVar("T")


class SourcedPair(NamedTuple):
    """A pair and its place, as "FILE, row N"."""

    pair: Pair
    place: str


class _Contents(NamedTuple):
    sha256: str
    split: Split[SourcedPair]


@settings
class PairsFile:
    """Pairs from a JSON Lines or Parquet file in one of TRL's preference formats: the columns
    prompt, chosen and rejected, as texts or as lists of messages, or chosen and rejected alone,
    which then begin with the prompt; and optionally chosen_reward and rejected_reward.

    A folder with train and test files, or a run folder of stage=preferences, is split as its files
    are; of a single file a `held_out_fraction` of the prompts is held out. Other columns are
    ignored. An answer ends with EOS unless chosen_ended or rejected_ended is false.
    """

    path: Text
    """.jsonl or .parquet file, folder with train and test files, run folder of stage=preferences,
    or artifact:NAME."""
    prepend_bos: bool = False
    """Whether a prompt begins with BOS; as in the policy's task."""
    held_out_fraction: OpenFraction = 0.1
    """Fraction of the prompts of a single file, 0.05 to 0.5."""
    data_seed: Index = 0
    """Draws the prompts held out of a single file; any integer from 0."""

    def fingerprint(self) -> str:
        """The SHA-256 of the files in hexadecimal digits; "" for an artifact of an earlier step.

        Raises ConfigError if they cannot be read as described or hold fewer than 20 pairs.
        """
        return "" if is_reference(self.path) else self._contents.sha256

    def train_prompts(self) -> tuple[Prompt, ...]:
        """The distinct prompts of the training pairs."""
        return _distinct_prompts(self.pair_split().train)

    def eval_prompts(self) -> tuple[Prompt, ...]:
        """The distinct prompts of the held-out pairs."""
        return _distinct_prompts(self.pair_split().held_out)

    def pair_split(self) -> Split[Pair]:
        """Training and held-out pairs. If a single file has at least ten prompts, no prompt is in
        both; with fewer, pairs are held out one by one."""
        return Split(*(tuple(s.pair for s in part) for part in self._contents.split))

    def sources(self) -> Split[str]:
        """The place of each pair of `pair_split`."""
        return Split(*(tuple(s.place for s in part) for part in self._contents.split))

    @cached_property
    def _contents(self) -> _Contents:
        files = locate_pairs(self.path)
        file_pairs = [
            [SourcedPair(pair, f"{file}, row {row}") for row, pair in read_pairs(file)]
            for file in files
        ]
        pairs = [sourced_pair for pairs in file_pairs for sourced_pair in pairs]
        if len(pairs) < MIN_PAIRS:
            raise ConfigError(
                f"task.path: {self.path} holds {len(pairs)} pairs: give at least {MIN_PAIRS}"
            )
        _check_rewards(pairs)
        if len(files) == 1:
            split = hold_out(
                pairs,
                fraction=self.held_out_fraction,
                salt=str(self.data_seed),
                prompt_of=lambda sourced_pair: prompt_key(sourced_pair.pair.prompt),
            )
        else:
            split = Split(*map(tuple, file_pairs))
        if not split.train:
            raise ConfigError(
                f"task.path: {self.path} leaves no pairs to train on: change"
                f" task.held_out_fraction={self.held_out_fraction} or add pairs"
            )
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
        return _Contents(digest.hexdigest(), split)


def hold_out(
    items: Sequence[T], *, fraction: float, salt: str, prompt_of: Callable[[T], str]
) -> Split[T]:
    """The items, with about a `fraction` of the prompts held out by a hash of salt and prompt, at
    least one; with fewer than ten prompts, items are held out one by one. To split a part again,
    use another salt."""
    prompts = [prompt_of(item) for item in items]
    by_prompt = len(set(prompts)) >= MANY_PROMPTS
    keys = [f"{salt} {p}" if by_prompt else f"{salt} {i} {p}" for i, p in enumerate(prompts)]
    return split_by_keys(items, keys, fraction)


def num_shared(split: Split[Pair]) -> int:
    """The number of held-out pairs whose prompt is also in the training pairs."""
    trained = {prompt_key(pair.prompt) for pair in split.train}
    return sum(prompt_key(pair.prompt) in trained for pair in split.held_out)


def locate_pairs(path: str) -> list[Path]:
    """The file itself, or the train and test files of a folder or of its `pairs` folder. Raises
    ConfigError if there are none."""
    source = Path(path).expanduser()
    if source.is_file():
        return [source]
    for folder in (source, source / FOLDER):
        for ending in FORMATS:
            files = [folder / f"{name}.{ending}" for name in ("train", "test")]
            if all(file.is_file() for file in files):
                return files
    raise ConfigError(
        f"task.path={path}: no such file, and no folder with train and test files of pairs"
        f" ({' or '.join(FORMATS)}) in it or in its {FOLDER}/"
    )


def read_pairs(file: Path) -> Iterator[tuple[int, Pair]]:
    """The pairs of a file, each with its row number, from 1. Raises ConfigError naming file, row
    and field for a malformed pair."""
    table = read_table(Source(path=str(file), text_columns=TEXTS))
    for number, row in table.rows(range(table.num_rows)):
        yield number, read_pair(row, f"task.path: {file}, row {number}")


def write_pairs(pairs: Iterable[Pair], file: Path) -> None:
    """Writes a .jsonl or .parquet file with a column for each field of the pairs; the answers to
    conversations are lists of one message."""
    rows = [pair_row(pair) for pair in pairs]
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix.lower() == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), file)
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.write_text("".join(lines), encoding="utf-8")


def _distinct_prompts(pairs: Sequence[Pair]) -> tuple[Prompt, ...]:
    prompts = {prompt_key(pair.prompt): pair.prompt for pair in pairs}
    return tuple(p if isinstance(p, str) else PromptRow(p, {}) for p in prompts.values())


def _check_rewards(pairs: Sequence[SourcedPair]) -> None:
    """Raises ConfigError if only some of the pairs have rewards."""
    expect_none = pairs[0].pair.chosen_reward is None
    for pair, place in pairs:
        if (pair.chosen_reward is None) != expect_none:
            has, others = ("a", "have none") if expect_none else ("no", "have them")
            raise ConfigError(
                f"task.path: {place} has {has} chosen_reward where earlier rows {others}:"
                " give rewards for all pairs or for none"
            )

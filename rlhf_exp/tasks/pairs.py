"""Reads preference pairs from files, and writes them to files that `datasets` and TRL read.

Knows the columns and refuses an ambiguous row, naming file, row and field.
"""

import hashlib
import json
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from rlhf_exp.settings import ConfigError, Index, OpenFraction, Text, is_reference, settings
from rlhf_exp.tasks.hashing import split_by_keys
from rlhf_exp.tasks.protocol import Pair, Split
from rlhf_exp.tasks.tables import Source, read_table
from rlhf_exp.tasks.text_files import check_unicode

TEXTS, REWARDS = ("prompt", "chosen", "rejected"), ("chosen_reward", "rejected_reward")
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
    """Pairs from a JSON Lines or Parquet file in the format of TRL's RewardTrainer: the columns
    prompt, chosen and rejected, and optionally chosen_reward and rejected_reward.

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

    def train_prompts(self) -> tuple[str, ...]:
        """The distinct prompts of the training pairs."""
        return tuple(dict.fromkeys(pair.prompt for pair in self.pair_split().train))

    def eval_prompts(self) -> tuple[str, ...]:
        """The distinct prompts of the held-out pairs."""
        return tuple(dict.fromkeys(pair.prompt for pair in self.pair_split().held_out))

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
                prompt_of=lambda sourced_pair: sourced_pair.pair.prompt,
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
    trained = {pair.prompt for pair in split.train}
    return sum(pair.prompt in trained for pair in split.held_out)


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
        yield number, _pair(row, f"task.path: {file}, row {number}")


def write_pairs(pairs: Iterable[Pair], file: Path) -> None:
    """Writes a .jsonl or .parquet file with a column for each field of the pairs."""
    rows = [pair._asdict() for pair in pairs]
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix.lower() == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), file)
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.write_text("".join(lines), encoding="utf-8")


def _pair(row: Mapping[str, Any], where: str) -> Pair:
    for name in TEXTS:
        if row.get(name) is None:
            raise ConfigError(
                f"{where} has no field {name}: pairs need {', '.join(TEXTS)}; it has"
                f" {', '.join(key for key in row if row[key] is not None) or 'none'}"
            )
        if not isinstance(row[name], str):
            raise ConfigError(
                f"{where}, field {name} is a {type(row[name]).__name__}, not a text: apply the chat"
                " template to conversations first"
            )
        if name == "prompt" and not row[name].strip():
            raise ConfigError(f"{where}, field {name} is blank: fill it in or remove the row")
        check_unicode(row[name], f"{where}, field {name}")
    if row["chosen"] == row["rejected"]:
        raise ConfigError(
            f"{where}, field rejected equals chosen: two equal texts have no order; remove the row"
        )
    chosen_reward, rejected_reward = _rewards(row, where) or (None, None)
    return Pair(
        prompt=row["prompt"],
        chosen=row["chosen"],
        rejected=row["rejected"],
        chosen_reward=chosen_reward,
        rejected_reward=rejected_reward,
        chosen_ended=_ended(row, "chosen_ended", where),
        rejected_ended=_ended(row, "rejected_ended", where),
    )


def _rewards(row: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    """Both rewards, None if the row has neither."""
    values = [row.get(name) for name in REWARDS]
    if values == [None, None]:
        return None
    for name, value in zip(REWARDS, values, strict=True):
        if value is None:
            raise ConfigError(f"{where} has one reward but no {name}: give both")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < sys.float_info.max:  # false for NaN too
            raise ConfigError(
                f"{where}, field {name} is {reprlib.repr(value)}: give a finite number"
            )
    chosen, rejected = (float(value) for value in values if value is not None)
    if chosen <= rejected:
        raise ConfigError(
            f"{where}, field chosen_reward is {chosen:g}, not above rejected_reward {rejected:g}:"
            " swap the answers, or remove a tie"
        )
    return chosen, rejected


def _ended(row: Mapping[str, Any], name: str, where: str) -> bool:
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}, field {name} is {value!r}: give true or false")
    return value is None or value


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

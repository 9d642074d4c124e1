"""Tables from files, from directories and from the Hugging Face hub.

Knows names, files and their errors, all of which it raises as ConfigError; it does not know what
the columns mean. Single files are read by hand: `datasets` and pyarrow turn texts that look like
dates into dates, and do not say which row is broken.
"""

import csv
import io
import json
import logging
import re
import reprlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_exp.hf import quiet_datasets
from rlhf_exp.machine.network import hub_responds, hub_url
from rlhf_exp.runs.lfs import refuse_lfs_pointer
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.csv_types import rows_of, typed_columns
from rlhf_exp.tasks.text_files import read_text

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
CHUNK = 1000  # rows decoded at once; one by one, `datasets` takes ten times as long


@dataclass(frozen=True)
class Table:
    """Rows by column name. `numbers` are row numbers in the file or split, from 1: the line in text
    and JSON Lines files, the row after the header in CSV."""

    column_names: tuple[str, ...]
    numbers: Sequence[int]
    fetch: Callable[[Sequence[int]], Sequence[Row]]

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.numbers)

    def rows(self, order: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """The rows at these indices, each with its number; read lazily."""
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            numbers = [self.numbers[i] for i in chunk]
            yield from zip(numbers, self.fetch(chunk), strict=True)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The dataset that task.path names, and the columns of CSV files that stay texts.

    A single file has one split, train. Slices are written as in `datasets`: train[:1000].
    `split_field` is the key that sets the split, for messages.
    """

    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_columns: Sequence[str] = ()
    split_field: str = "task.split"


def read_table(source: Source) -> Table:
    """A split of a dataset: a file, a directory that `datasets` reads, or a name on the hub.

    A column of a CSV file is converted if all cells are numbers or all are booleans, with None for
    missing cells; all others, and the text_columns, stay texts. Raises ConfigError naming the field
    if there is no such dataset, subset, revision or split, and for a file that cannot be read or
    has no rows.
    """
    path = source.path
    place = Path(path).expanduser()
    if place.is_file():
        table = _read_file(place, source)
    elif place.is_dir():
        table = _read_directory(place, source)
    elif place.suffix.lower() in READERS or not HUB_NAME.fullmatch(path):
        raise ConfigError(f"task.path={path}: no such file or directory, and not a name on the hub")
    else:
        log.info("task.path: reading %s from %s or its local cache", path, hub_url())
        table = _read_hub(source)
    if not table.num_rows:
        part = "" if source.split == "train" else f" in {source.split}"
        raise ConfigError(f"task.path: {path} holds no rows{part}; give at least one")
    return table


def _read_file(file: Path, source: Source) -> Table:
    for name, value in (("subset", source.subset), ("revision", source.revision)):
        if value is not None:
            raise ConfigError(
                f"task.{name}={value}: {source.path} is a file, which has none; set it null"
            )
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"task.path={source.path}: unknown ending; use one of {', '.join(READERS)}, a"
            " directory or a name on the hub"
        )
    table = reader(file, source)
    if source.split == "train":  # without the second that `datasets` takes to be imported
        return table
    chosen = _row_indices(source, {"train": table.num_rows})
    return Table(
        column_names=table.column_names,
        numbers=[table.numbers[i] for i in chosen],
        fetch=lambda indices: table.fetch([chosen[i] for i in indices]),
    )


@quiet_datasets()
def _row_indices(source: Source, lengths: Mapping[str, int]) -> list[int]:
    """The indices of the rows of `split`, which may be a slice or a sum of named splits."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute(dict(lengths))
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"{source.split_field}={source.split}: {source.path} has no such split; it has"
            f" {', '.join(lengths)}, and slices such as {next(iter(lengths), 'train')}[:1000]"
        ) from error
    return [i for part in parts for i in range(part.from_, part.to)]


def _in_memory(column_names: Sequence[str], rows: Mapping[int, Row]) -> Table:
    """A table of rows, by row number; None for columns that a row lacks."""
    filled = [{name: row.get(name) for name in column_names} for row in rows.values()]
    return Table(tuple(column_names), tuple(rows), lambda indices: [filled[i] for i in indices])


def _read_text(file: Path, source: Source) -> Table:
    lines = dict(enumerate(read_text(file, field="task.path").split("\n"), start=1))
    texts = {number: line.removesuffix("\r") for number, line in lines.items() if line.strip()}
    return _in_memory(["text"], {number: {"text": text} for number, text in texts.items()})


def _read_csv(file: Path, source: Source) -> Table:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    contents = read_text(file, field="task.path")
    header, rows = _csv_rows(contents, delimiter, f"task.path: {source.path}")
    cells = dict(zip(header, zip(*rows, strict=True), strict=True)) if rows else {}
    typed = rows_of(typed_columns(cells, source.text_columns))
    return _in_memory(header, dict(enumerate(typed, start=1)))


def _csv_rows(contents: str, delimiter: str, where: str) -> tuple[list[str], list[list[str]]]:
    """The header and the rows after it, without blank lines."""
    first = re.split(r"[\r\n]", contents.lstrip(), maxsplit=1)[0]
    others = [name for separator, name in SEPARATORS.items() if separator in first]
    if others and delimiter not in first:
        raise ConfigError(
            f"{where} separates its columns by {others[0]}, not by {SEPARATORS[delimiter]}: save it"
            " with commas as .csv, or with tabs as .tsv"
        )
    limit = csv.field_size_limit(sys.maxsize)
    rows: list[list[str]] = []
    try:
        lines = io.StringIO(contents, newline="")
        rows += (row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row)
    except csv.Error as error:
        raise ConfigError(
            f"{where}, row {max(1, len(rows))} is not quoted correctly ({error!s:.60}); put a field"
            " that contains quotes into quotes, and double the inner ones"
        ) from error
    finally:
        csv.field_size_limit(limit)
    header = rows[0] if rows else ["text"]
    if len(set(header)) < len(header) or not all(header):
        raise ConfigError(
            f"{where} has the header {', '.join(header)!r}; give each column a different name"
        )
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(header):
            raise ConfigError(
                f"{where}, row {number} has {len(row)} fields where the header has {len(header)};"
                f" put a field that holds {delimiter!r} into quotes"
            )
    return header, rows[1:]


def _read_json(file: Path, source: Source) -> Table:
    """Reads JSON Lines, or one list."""
    contents = read_text(file, field="task.path")
    where = f"task.path: {source.path}"
    lines: Iterable[tuple[int, Any]]
    if contents.lstrip().startswith("["):
        lines = enumerate(_parse(contents, where), start=1)
    else:
        lines = (
            (number, _parse(line, f"{where}, row {number}"))
            for number, line in enumerate(contents.split("\n"), start=1)
            if line.strip()
        )
    rows = dict(lines)
    for number, row in rows.items():
        if not isinstance(row, dict):
            raise ConfigError(
                f'{where}, row {number} is {reprlib.repr(row)}; give an object: {{"prompt": ...}}'
            )
    return _in_memory(list(dict.fromkeys(name for row in rows.values() for name in row)), rows)


def _parse(contents: str, where: str) -> Any:
    try:
        return json.loads(contents)
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 column", "column")[:80]
        raise ConfigError(
            f"{where} is not JSON ({reason}); give one object a line, or one list of objects"
        ) from error


@quiet_datasets()
def _read_parquet(file: Path, source: Source) -> Table:
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        refuse_lfs_pointer(file, field="task.path")
        with parquet.ParquetFile(file) as opened:
            dataset = datasets.Dataset(opened.read())
    except ConfigError:
        raise
    except (ArrowException, ValueError, OSError) as error:
        raise ConfigError(
            f"task.path: {source.path} cannot be read as Parquet: {_short(error)}"
        ) from error
    return _table_from_dataset(dataset, source, range(1, dataset.num_rows + 1))


READERS: Mapping[str, Callable[[Path, Source], Table]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}


def _table_from_dataset(dataset: Any, source: Source, numbers: Sequence[int]) -> Table:
    def fetch(indices: Sequence[int]) -> Sequence[Row]:
        try:
            columns = dataset[list(indices)]
        except Exception as error:  # libraries that decode images and audio raise any kind
            raise ConfigError(
                f"task.path: rows of {source.path} cannot be read: {_short(error)}"
            ) from error
        return rows_of(columns)

    return Table(tuple(dataset.column_names), numbers, fetch)


@quiet_datasets()
def _read_directory(directory: Path, source: Source) -> Table:
    if source.revision is not None:
        raise ConfigError(
            f"task.revision={source.revision} is for names on the hub;"
            f" {source.path} is a directory: set it null"
        )
    # Not the usual cache of `datasets`, which returns old rows of a file that changed but kept its
    # modification time. The rows stay mapped in memory after the folder is deleted.
    with tempfile.TemporaryDirectory(prefix="rlhf_exp-", ignore_cleanup_errors=True) as cache:
        # Absolute, since `datasets` takes a plain "json" for its JSON reader.
        fix = "`datasets` reads folders of .jsonl, .json, .parquet, .csv or .txt files"
        name = str(directory.absolute())
        return _load(name, source, fix, cache=cache)


@quiet_datasets()
def _read_hub(source: Source) -> Table:
    import datasets

    was_offline = datasets.config.HF_HUB_OFFLINE
    if not was_offline and hub_responds():
        return _load(source.path, source, f"check the name on {hub_url()}/datasets, or name a file")
    why = "HF_HUB_OFFLINE is set" if was_offline else f"{hub_url()} is out of reach"
    fix = f"{why}, and it is not in the local cache; name a file or a directory"
    # Otherwise `datasets` tries to connect for half a minute.
    datasets.config.HF_HUB_OFFLINE = True
    try:
        return _load(source.path, source, fix, offline=why)
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def _load(
    name: str,
    source: Source,
    fix: str,
    *,
    cache: str | None = None,
    offline: str | None = None,
) -> Table:
    """The split as `datasets` reads it. `offline` is the reason to read only the local cache, for
    messages. CSV files in a directory get the column types of a single CSV file."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.packaged_modules.csv.csv import Csv

    open_builder = partial(
        datasets.load_dataset_builder,
        name,
        source.subset,
        revision=source.revision,
        cache_dir=cache,
    )
    try:
        builder = open_builder()
        is_csv = cache is not None and isinstance(builder, Csv) and builder.info.features is None
        # The cache may return another revision than the one named.
        if isinstance(builder, Cache) and source.revision not in (None, "main", builder.hash):
            raise ConfigError(
                f"task.revision={source.revision}: {offline or 'the hub has none'},"
                f" and the local cache holds {builder.hash}; set that, or null"
            )
        builder.download_and_prepare()
        if is_csv:  # as texts: `datasets` turns integers with empty cells into floats, NA into None
            texts = dict.fromkeys(builder.info.features, datasets.Value("string"))
            builder = open_builder(features=datasets.Features(texts), keep_default_na=False)
            builder.download_and_prepare()
        lengths = {name: part.num_examples for name, part in builder.info.splits.items()}
        numbers = [index + 1 for index in _row_indices(source, lengths)]
        # `datasets` refuses an empty split.
        dataset = builder.as_dataset(split=source.split) if numbers else None
    except ConfigError:
        raise
    except Exception as error:  # builders pass on any error of their readers
        reason = _short(error)
        if reason.startswith(("BuilderConfig", "Config name")):
            raise ConfigError(
                f"task.subset={source.subset or 'null'}: {source.path}: {reason}"
            ) from error
        raise ConfigError(f"task.path={source.path} cannot be read: {fix}.\n  {reason}") from (
            error
        )
    if dataset is None:
        return _in_memory([], {})
    if is_csv:
        columns = typed_columns(dataset.to_dict(), source.text_columns)
        return _in_memory([*columns], dict(zip(numbers, rows_of(columns), strict=True)))
    return _table_from_dataset(dataset, source, numbers)


def _short(error: BaseException, limit: int = 300) -> str:
    from datasets.exceptions import DatasetGenerationError

    # DatasetGenerationError says only that there was an error; its cause says which.
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration):
        return "it holds an empty file"
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]

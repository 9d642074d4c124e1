"""Tables from files, from directories and from the Hugging Face hub.

It knows names, files and what goes wrong with them: every failure is a ConfigError. It knows
nothing of what the columns mean.
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
from rlhf_exp.tasks.columns import rows_of, typed_columns

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
CHUNK = 1000  # rows that are decoded at once; one by one takes `datasets` ten times as long


@dataclass(frozen=True)
class Table:
    """Rows by column name. `numbers` are their places in the file, or in the part of a dataset,
    from 1: in a text file or JSON Lines the line, in CSV that below the header."""

    column_names: tuple[str, ...]
    numbers: Sequence[int]
    fetch: Callable[[Sequence[int]], Sequence[Row]]

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.numbers)

    def rows(self, order: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """The rows at these indices, each with its number; they are read as they are asked for."""
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            numbers = [self.numbers[i] for i in chunk]
            yield from zip(numbers, self.fetch(chunk), strict=True)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is asked for, and the fields that the user set it by, for messages."""

    path: str
    subset: str | None
    split: str
    revision: str | None
    field: str
    split_field: str

    def sibling(self, name: str) -> str:
        """Another field of the same group."""
        return f"{self.field.partition('.')[0]}.{name}"


def read_table(
    path: str,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    text_columns: Sequence[str] = (),
    field: str,
    split_field: str,
) -> Table:
    """A split of a dataset: a file, a directory that `datasets` reads, or a name on the hub.

    A single file has one split, train. Slices are as `datasets` writes them: train[:1000]. A
    column of a CSV file whose filled cells are all numbers, or all booleans, has these types and
    None in its gaps; other columns, and the text_columns, are texts as they are in the file.
    Raises ConfigError naming the field if there is no such dataset, subset, revision or split, and
    for a file that cannot be read or holds no rows.
    """
    asked = Source(
        path=path,
        subset=subset,
        split=split,
        revision=revision,
        field=field,
        split_field=split_field,
    )
    place = Path(path).expanduser()
    is_local = place.is_file() or place.is_dir()
    if not is_local and (place.suffix.lower() in READERS or not HUB_NAME.fullmatch(path)):
        raise ConfigError(f"{field}={path}: no such file or directory, and no name on the hub")
    if not is_local:
        log.info("%s: reading %s from %s or its local cache", field, path, hub_url())
    with quiet_datasets():
        if place.is_file():
            table = _read_file(place, asked, text_columns)
        elif is_local:
            table = _read_directory(place, asked, text_columns)
        else:
            table = _read_hub(asked)
    if not table.num_rows:
        part = "" if split == "train" else f" in {split}"
        raise ConfigError(f"{field}: {path} holds no rows{part}; give at least one")
    return table


def _read_file(file: Path, asked: Source, text_columns: Sequence[str]) -> Table:
    for name, value in (("subset", asked.subset), ("revision", asked.revision)):
        if value is not None:
            raise ConfigError(
                f"{asked.sibling(name)}={value}: {asked.path} is a file, which has none; set it"
                " null"
            )
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"{asked.field}={asked.path}: unknown ending; use one of {', '.join(READERS)}, a"
            " directory or a name on the hub"
        )
    try:
        refuse_lfs_pointer(file, field=asked.field)
        table = reader(file, asked, text_columns)
    except OSError as error:
        raise ConfigError(
            f"{asked.field}: cannot read {asked.path} ({error.strerror or error})"
        ) from error
    chosen = _places(asked, {"train": table.num_rows})
    return Table(
        column_names=table.column_names,
        numbers=[table.numbers[i] for i in chosen],
        fetch=lambda indices: table.fetch([chosen[i] for i in indices]),
    )


def _places(asked: Source, lengths: Mapping[str, int]) -> list[int]:
    """The index of each row of the split in its part; slices and sums of parts are splits too."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(asked.split).to_absolute(dict(lengths))
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"{asked.split_field}={asked.split}: {asked.path} has no such part; it has"
            f" {', '.join(lengths)}, and slices as {next(iter(lengths), 'train')}[:1000]"
        ) from error
    return [i for part in parts for i in range(part.from_, part.to)]


def _listed(column_names: Sequence[str], rows: Mapping[int, Row]) -> Table:
    """A table of rows by their number that are in memory; columns that a row lacks are None."""
    listed = [{name: row.get(name) for name in column_names} for row in rows.values()]
    return Table(tuple(column_names), tuple(rows), lambda indices: [listed[i] for i in indices])


def _decode(file: Path, asked: Source) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{asked.field}: {asked.path}, line {line} is not UTF-8; save the file as UTF-8"
        ) from error


def _read_text(file: Path, asked: Source, text_columns: Sequence[str]) -> Table:
    lines = dict(enumerate(_decode(file, asked).split("\n"), start=1))
    texts = {number: line.removesuffix("\r") for number, line in lines.items() if line.strip()}
    return _listed(["text"], {number: {"text": text} for number, text in texts.items()})


def _read_csv(file: Path, asked: Source, text_columns: Sequence[str]) -> Table:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    header, rows = _csv_rows(_decode(file, asked), delimiter, f"{asked.field}: {asked.path}")
    cells = dict(zip(header, zip(*rows, strict=True), strict=True)) if rows else {}
    typed = rows_of(typed_columns(cells, text_columns))
    return _listed(header, dict(enumerate(typed, start=1)))


def _csv_rows(contents: str, delimiter: str, where: str) -> tuple[list[str], list[list[str]]]:
    """The header and the rows below it, blank lines left out."""
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
            f"{where}, row {max(1, len(rows))} is not quoted as it must be ({error!s:.60}); put a"
            " field with quotes into quotes, and double those within"
        ) from error
    finally:
        csv.field_size_limit(limit)
    header = rows[0] if rows else ["text"]
    if len(set(header)) < len(header) or not all(header):
        raise ConfigError(
            f"{where} has the header {', '.join(header)!r}; give each column a name of its own"
        )
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(header):
            raise ConfigError(
                f"{where}, row {number} has {len(row)} fields where the header has {len(header)};"
                f" put a field that holds {delimiter!r} into quotes"
            )
    return header, rows[1:]


def _read_json(file: Path, asked: Source, text_columns: Sequence[str]) -> Table:
    """JSON Lines, or one list. Not by `datasets`, which takes texts that look like dates for
    dates, and gives every message all keys that any has."""
    contents = _decode(file, asked)
    where = f"{asked.field}: {asked.path}"
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
                f'{where}, row {number} is {reprlib.repr(row)}; give an object as {{"prompt": ...}}'
            )
    return _listed(list(dict.fromkeys(name for row in rows.values() for name in row)), rows)


def _parse(contents: str, where: str) -> Any:
    try:
        return json.loads(contents)
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 column", "column")[:80]
        raise ConfigError(
            f"{where} is not JSON ({reason}); give one object a line, or one list of objects"
        ) from error


def _read_parquet(file: Path, asked: Source, text_columns: Sequence[str]) -> Table:
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as opened:
            dataset = datasets.Dataset(opened.read())
    except (ArrowException, ValueError) as error:
        raise ConfigError(
            f"{asked.field}: {asked.path} cannot be read as Parquet: {_short(error)}"
        ) from error
    return _of_dataset(dataset, asked, range(1, dataset.num_rows + 1))


READERS: Mapping[str, Callable[[Path, Source, Sequence[str]], Table]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}


def _of_dataset(dataset: Any, asked: Source, numbers: Sequence[int]) -> Table:
    def fetch(indices: Sequence[int]) -> list[Row]:
        try:
            columns = dataset[list(indices)]
        except Exception as error:  # pictures and sounds are decoded here, by libraries of theirs
            raise ConfigError(
                f"{asked.field}: rows of {asked.path} cannot be read: {_short(error)}"
            ) from error
        values = zip(*columns.values(), strict=True)
        return [dict(zip(columns, entries, strict=True)) for entries in values]

    return Table(tuple(dataset.column_names), numbers, fetch)


def _read_directory(directory: Path, asked: Source, text_columns: Sequence[str]) -> Table:
    if asked.revision is not None:
        raise ConfigError(
            f"{asked.sibling('revision')}={asked.revision} is for names on the hub; {asked.path} is"
            " a directory: set it null"
        )
    # Not the cache of `datasets`, which would give the old rows of a file that was changed without
    # a new time; what is read from here stays mapped when the folder has gone.
    with tempfile.TemporaryDirectory(prefix="rlhf_exp-", ignore_cleanup_errors=True) as cache:
        # Absolute, as "json" alone is a reader of `datasets`.
        fix = "`datasets` reads folders of .jsonl, .json, .parquet, .csv or .txt files"
        name = str(directory.absolute())
        return _built(name, asked, fix, cache=cache, text_columns=text_columns)


def _read_hub(asked: Source) -> Table:
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    if not before and hub_responds():
        return _built(asked.path, asked, f"check the name on {hub_url()}/datasets, or name a file")
    why = "HF_HUB_OFFLINE is set" if before else f"{hub_url()} is out of reach"
    fix = f"{why}, and it is not in the local cache; name a file or a directory"
    # `datasets` asks and waits for half a minute unless it is told.
    datasets.config.HF_HUB_OFFLINE = True
    try:
        return _built(asked.path, asked, fix, offline=why)
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _built(
    name: str,
    asked: Source,
    fix: str,
    *,
    cache: str | None = None,
    offline: str | None = None,
    text_columns: Sequence[str] = (),
) -> Table:
    """The split, as a builder of `datasets` reads it; `offline` says why only from the cache. The
    columns of CSV files in a directory have the types that those of a single file have."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.packaged_modules.csv.csv import Csv

    load = partial(
        datasets.load_dataset_builder, name, asked.subset, revision=asked.revision, cache_dir=cache
    )
    try:
        builder = load()
        is_csv = cache is not None and isinstance(builder, Csv) and builder.info.features is None
        # From the cache it is whatever there is, of another revision too.
        if isinstance(builder, Cache) and asked.revision not in (None, "main", builder.hash):
            raise ConfigError(
                f"{asked.sibling('revision')}={asked.revision}: {offline or 'the hub has none'},"
                f" and the local cache holds {builder.hash}; set it so, or null"
            )
        builder.download_and_prepare()
        if is_csv:  # `datasets` makes floats of integers with a gap, and None of NA: now as texts
            texts = dict.fromkeys(builder.info.features, datasets.Value("string"))
            builder = load(features=datasets.Features(texts), keep_default_na=False)
            builder.download_and_prepare()
        lengths = {name: part.num_examples for name, part in builder.info.splits.items()}
        numbers = [index + 1 for index in _places(asked, lengths)]
        # `datasets` refuses to read none.
        dataset = builder.as_dataset(split=asked.split) if numbers else None
    except ConfigError:
        raise
    except Exception as error:  # builders raise what their readers do
        reason = _short(error)
        if reason.startswith(("BuilderConfig", "Config name")):
            raise ConfigError(
                f"{asked.sibling('subset')}={asked.subset or 'null'}: {asked.path}: {reason}"
            ) from error
        raise ConfigError(f"{asked.field}={asked.path} cannot be read: {fix}.\n  {reason}") from (
            error
        )
    if dataset is None:
        return _listed([], {})
    if is_csv:
        columns = typed_columns(dataset.to_dict(), text_columns)
        return _listed([*columns], dict(zip(numbers, rows_of(columns), strict=True)))
    return _of_dataset(dataset, asked, numbers)


def _short(error: BaseException, limit: int = 300) -> str:
    from datasets.exceptions import DatasetGenerationError

    # Which says only that there was an error.
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration):
        return "it holds an empty file"
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]

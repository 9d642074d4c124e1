"""The first and the last evaluation's samples of a run, side by side."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from rlhf_exp.runs.files import parse_row
from rlhf_exp.runs.status import finite_number

SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt's completions at the first and the last evaluation; None if missing."""

    prompt: str
    before: str
    after: str | None
    score_before: float | None
    score_after: float | None


def encodable(text: str) -> str:
    """The text with lone surrogates, as in undecodable file names, replaced for UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_samples(path: Path, problems: list[str]) -> list[Sample]:
    """Up to eight prompts with their first and last completions; empty without the file."""
    try:
        first, last = read_ends(path, count=SHOWN)
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return []
    if not first:
        problems.append(f"{path}: no sample in it that can be read")
        return []
    if last[0]["phase"] == first[0]["phase"]:
        last = []
    return [
        Sample(
            prompt=encodable(old["prompt"]),
            before=encodable(old["completion"]),
            after=None if new is None else encodable(new["completion"]),
            score_before=finite_number(old.get("score")),
            score_after=finite_number((new or {}).get("score")),
        )
        for old, new in itertools.zip_longest(first, last[: len(first)])
        if new is None or new["prompt"] == old["prompt"]
    ]


def read_ends(
    path: Path, *, count: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the first and of the last evaluation in a samples.jsonl, at most `count` of each.
    Leaves out broken lines. Raises OSError if the file cannot be read."""
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    with path.open("rb") as file:
        lines = (line for line in file if line.startswith(b'{"phase": '))
        for _, evaluation in itertools.groupby(lines, key=lambda line: line.partition(b",")[0]):
            # Only so many are parsed: a sweep's files have hundreds of megabytes.
            rows = filter(_is_sample, map(parse_row, itertools.islice(evaluation, count)))
            last = list(rows) or last
            first = first or last
    return first, last


def _is_sample(row: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    return row is not None and all(isinstance(row.get(k), str) for k in ("prompt", "completion"))

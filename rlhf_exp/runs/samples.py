"""The first and the last evaluation's samples of a run, side by side.

It reads only the two ends of samples.jsonl: a sweep's files are hundreds of megabytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_exp.runs.files import parse_row
from rlhf_exp.runs.status import finite_number

SHOWN = 8
HEAD = 1 << 16
MAX_TAIL = 1 << 24  # bytes; samples of a larger evaluation are not shown


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
        with path.open("rb") as file:
            first, last = _ends(file)
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return []
    if not first:
        problems.append(f"{path}: no sample in it that can be read")
        return []
    if last and last[0]["phase"] == first[0]["phase"]:
        last = []
    pairs = [(row, last[i] if i < len(last) else None) for i, row in enumerate(first)]
    return [
        Sample(
            prompt=encodable(old["prompt"]),
            before=encodable(old["completion"]),
            after=None if new is None else encodable(new["completion"]),
            score_before=finite_number(old.get("score")),
            score_after=finite_number((new or {}).get("score")),
        )
        for old, new in pairs
        if new is None or new["prompt"] == old["prompt"]
    ]


def _ends(file: BinaryIO) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    size = file.seek(0, 2)
    head, length = b"", HEAD
    while head.count(b"\n") < SHOWN and len(head) < size and length <= MAX_TAIL:
        head, length = _block(file, 0, length), length * 4
    # A few lines only, since each is parsed.
    first = _rows(head.split(b"\n")[: 4 * SHOWN])
    first = [row for row in first if row["phase"] == first[0]["phase"]][:SHOWN]
    length = HEAD
    while length <= MAX_TAIL:
        whole = length >= size
        tail = _block(file, max(0, size - length), length)
        lines = tail.split(b"\n")[0 if whole else 1 :]
        start = _start_of_last(lines)
        if start or whole:
            return first, _rows(lines[start or 0 : (start or 0) + SHOWN])
        length *= 4
    return first, []


def _block(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _start_of_last(lines: list[bytes]) -> int:
    """The index of the last phase's first row; 0 if the phase starts at or before the first
    line."""
    rows = (row for line in reversed(lines) for row in _rows([line]))
    last = next(rows, None)
    if last is None:
        return 0
    mark = b'{"phase": %d,' % last["phase"]
    return next((i + 1 for i in range(len(lines) - 1, -1, -1) if _is_other(lines[i], mark)), 0)


def _is_other(line: bytes, mark: bytes) -> bool:
    return line.startswith(b'{"phase": ') and not line.startswith(mark)


def _rows(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    rows = [row for line in lines if (row := parse_row(line)) is not None]
    return [r for r in rows if all(isinstance(r.get(k), str) for k in ("prompt", "completion"))]

"""A run's status, written and read; and the state of a sweep's jobs, which is read from the files
in their folders, so that it works for every launcher and every machine that shares the disk."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf_exp.runs.files import parse_object, write_whole
from rlhf_exp.runs.paths import METRICS, STATUS
from rlhf_exp.security.printable import printable
from rlhf_exp.security.redaction import scrub

Status = Literal["running", "done", "failed", "interrupted"]
LEASED = "RLHF_EXP_GPU"  # environment variable of a job: the name of the GPU that it leases
TAIL = 1 << 14  # bytes; a row of metrics.jsonl has about 1 kB


def write_status(folder: Path, status: Status, error: str | None = None) -> None:
    """Writes status.json, without secrets and without control characters; from a process that
    leases a GPU, with the GPU's name."""
    content = {"status": status, "error": error and printable(scrub(error))}
    if gpu := os.environ.get(LEASED):
        content["gpu"] = gpu
    write_whole(folder / STATUS, json.dumps(content) + "\n")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """`status` is from status.json, "waiting" if missing or unknown, and so is `gpu`, the GPU that
    the job leases or leased; score and KL are the newest in metrics.jsonl, of an evaluation if the
    run is done."""

    status: str
    error: str | None = None
    gpu: str | None = None
    phase: int | None = None
    score: float | None = None
    kl: float | None = None


def read_state(folder: Path) -> JobState:
    """The state of a job; an unreadable file counts as missing."""
    status = _read_json(folder / STATUS)
    newest: dict[str, Any] = {}
    evaluated: dict[str, Any] = {}
    for row in _last_rows(folder / METRICS):
        newest.update(row)
        if "eval/score" in row:
            evaluated = row
    done = status.get("status") == "done"
    side, score = (
        ("eval", "eval/score") if done and evaluated else ("objective", "objective/scores")
    )
    source = evaluated if side == "eval" else newest
    error, gpu = status.get("error"), status.get("gpu")
    phase = finite_number(newest.get("phase"))
    return JobState(
        status=status["status"] if status.get("status") in get_args(Status) else "waiting",
        error=error if isinstance(error, str) else None,
        gpu=gpu if isinstance(gpu, str) else None,
        phase=None if phase is None else int(phase),
        score=finite_number(source.get(score)),
        kl=finite_number(source.get(f"{side}/kl")),
    )


def is_done(run: Path) -> bool:
    """Returns True if the run's status says that it is done; a run that died may have left none."""
    return bool(_read_json(run / STATUS).get("status") == "done")


def finite_number(value: Any) -> float | None:
    """The value if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of 309 digits
        return None
    return number if math.isfinite(number) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes()) or {}
    except OSError:
        return {}


def _last_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            begin = max(0, file.tell() - TAIL)
            file.seek(begin)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = map(parse_object, lines[1 if begin else 0 : -1])  # the last is being written
    return [row for row in rows if row]

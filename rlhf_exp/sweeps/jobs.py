"""The jobs of a sweep: their names, numbers and folders, and sweep.json, which records them.

A job is identified by the settings that determine its results, so the same sweep can be started
again in the same folder, also with more values.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from rlhf_exp.runs.artifacts import content_hash
from rlhf_exp.runs.config_keys import use_of
from rlhf_exp.runs.files import write_whole
from rlhf_exp.security.redaction import redact_words
from rlhf_exp.settings import ConfigError

RECORD = "sweep.json"
STOP = ".stop"  # beside it once a job has failed with fail_fast=true: its jobs end, and none starts


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One job. `overrides` are words of Hydra's command line, `swept` those in which the jobs
    differ; `identity` is a hash of the configuration; `phases` is their number, None for a stage
    without phases; `seconds` is the expected duration, None if unknown."""

    overrides: tuple[str, ...]
    swept: tuple[str, ...]
    identity: str
    phases: int | None
    seconds: float | None = None
    number: int = -1
    folder: Path = Path()

    @property
    def label(self) -> str:
        """The swept overrides without secrets, each key shortened to its last part if unique."""
        return ",".join(_shorten(redact_words(self.swept))) or "all defaults"


class _Row(BaseModel, strict=True):
    overrides: tuple[str, ...]
    swept: tuple[str, ...]
    identity: str
    phases: int | None
    number: int
    # A name directly below the sweep's folder, since the folder's files may be removed.
    folder: Annotated[str, Field(pattern=r"\A\w[\w.=,+-]*\z")]


class _Record(BaseModel, strict=True):
    jobs: tuple[_Row, ...]


class BadJobs(ConfigError):
    """Jobs that cannot run: lists each problem with the jobs that have it."""

    def __init__(self, problems: Mapping[str, Sequence[str]], number: int) -> None:
        bad = {job for jobs in problems.values() for job in jobs}
        lines = [f"{problem}\n  in {', '.join(jobs)}" for problem, jobs in problems.items()]
        headline = f"{len(bad)} of {number} jobs cannot run, so nothing was started:"
        super().__init__("\n".join([headline, *lines]))


def identity(config: Mapping[str, Any]) -> str:
    """A hash of everything in a resolved configuration that determines a run's results."""
    return content_hash({k: v for k, v in config.items() if use_of(k, config).results})


def slug(text: str, limit: int = 80) -> str:
    """The text as a folder name: no slashes, and a hash instead of the end of a long text."""
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text).strip("-") or "default"
    if len(name) <= limit:
        return name
    return f"{name[: limit - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _shorten(words: Sequence[str]) -> list[str]:
    pairs = [word.lstrip("+~").split("=", 1) for word in words]
    last = Counter(key.rpartition(".")[2] for key, *_ in pairs)
    short = []
    for key, *value in pairs:
        name = key.rpartition(".")[2]
        short.append("=".join([name if last[name] == 1 else key, *map(_round_number, value)]))
    return short


def _round_number(value: str) -> str:
    value = re.sub(r"\\(.)", r"\1", value).strip("'\"")  # as it was before Hydra quoted it
    # A search draws numbers with 17 digits.
    if not re.fullmatch(r"-?\d*\.\d{5,}(e-?\d+)?|-?\d+\.\d+e-?\d+", value):
        return value
    return f"{float(value):.4g}"


def place(sweep: Path, jobs: Sequence[SweepJob]) -> list[SweepJob]:
    """The jobs with their numbers and folders below the sweep's: jobs in the record keep theirs,
    others get the next free numbers, and equal jobs become one. Raises ConfigError if the record
    cannot be read."""
    recorded_jobs = {job.identity: job for job in read_record(sweep)}
    free = max((job.number for job in recorded_jobs.values()), default=-1) + 1
    placed: dict[str, SweepJob] = {}
    for job in jobs:
        if job.identity in placed:
            continue
        if job.identity in recorded_jobs:
            old = recorded_jobs[job.identity]
            placed[job.identity] = replace(job, number=old.number, folder=old.folder)
            continue
        name = f"{free}_{slug(job.label)}"
        placed[job.identity] = replace(job, number=free, folder=sweep / name)
        free += 1
    return list(placed.values())


def read_record(sweep: Path) -> list[SweepJob]:
    """The jobs in a sweep's record; none without one."""
    path = sweep / RECORD
    if not path.is_file():
        return []
    try:
        record = _Record.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error if isinstance(error, OSError) else "it lacks a value or has another type"
        raise ConfigError(
            f"{path} cannot be read ({reason}): name another hydra.sweep.dir, or remove"
            " the file and let all jobs run again"
        ) from error
    return [SweepJob(**{**dict(row), "folder": sweep / row.folder}) for row in record.jobs]


def write_record(sweep: Path, jobs: Sequence[SweepJob], *, command: Sequence[str]) -> None:
    """Writes sweep.json: new and recorded jobs and the command line, without secrets."""
    all_jobs = {job.identity: job for job in [*read_record(sweep), *jobs]}
    rows = [
        {
            **asdict(job),
            "overrides": redact_words(job.overrides),
            "swept": redact_words(job.swept),
            "folder": job.folder.name,
            "seconds": None,
        }
        for job in sorted(all_jobs.values(), key=lambda job: job.number)
    ]
    text = json.dumps({"command": redact_words(command), "jobs": rows}, indent=2)
    write_whole(sweep / RECORD, text + "\n")

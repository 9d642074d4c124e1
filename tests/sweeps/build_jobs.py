"""Jobs of a sweep, and what they leave in their folders, for the tests of this folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.sweeps.jobs import SweepJob


def build_job(
    *swept: str, identity: str | None = None, phases: int | None = 10, **more: Any
) -> SweepJob:
    """A job that differs from others in the words `swept`."""
    own = ",".join(swept) if identity is None else identity
    return SweepJob(
        overrides=("experiment=reviews", *swept), swept=swept, identity=own, phases=phases, **more
    )


def placed_jobs(sweep: Path, number: int) -> list[SweepJob]:
    """Jobs with numbers and folders, which are not there yet."""
    jobs = [build_job(f"seed={i}", number=i) for i in range(number)]
    return [build_job(*j.swept, number=j.number, folder=sweep / f"{j.number}") for j in jobs]


def write_status(folder: Path, status: str, error: str | None = None) -> None:
    """status.json of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"status": status, "error": error}) + "\n"
    (folder / "status.json").write_text(text, encoding="utf-8")


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """metrics.jsonl of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")

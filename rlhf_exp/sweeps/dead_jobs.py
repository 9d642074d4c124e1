"""Sets the status of jobs whose process ended without writing one, and stops a sweep that is to
end at its first failure."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rlhf_exp.runs.lock import is_locked
from rlhf_exp.runs.status import read_state, write_status
from rlhf_exp.sweeps.isolation import describe_end
from rlhf_exp.sweeps.jobs import STOP, SweepJob

FAIL_FAST = "RLHF_EXP_FAIL_FAST"  # environment variable of a job: its failure stops the sweep
POLL_S = 0.5


def report_exit(folder: Path, exit_code: int) -> None:
    """Marks a job failed if its process ended with an error and without a status. With fail_fast,
    a failed job stops its sweep."""
    state = read_state(folder)
    if exit_code and state.status in ("waiting", "running") and not is_locked(folder):
        write_status(folder, "failed", describe_end(exit_code))
    if os.environ.get(FAIL_FAST) and read_state(folder).status == "failed":
        (folder.parent / STOP).touch()


def mark_failed(job: SweepJob, error: BaseException) -> None:
    """Marks a job failed with its launcher's error, unless the job wrote its own status."""
    if read_state(job.folder).status in ("waiting", "running"):
        write_status(job.folder, "failed", f"{type(error).__name__}: {error}")


def await_and_mark(jobs: Sequence[SweepJob], status: Literal["failed", "interrupted"]) -> None:
    """Waits for the jobs, then writes the status for those whose process died without one."""
    await_end(jobs)
    mark_dead(jobs, status)


def await_end(jobs: Sequence[SweepJob]) -> None:
    """Waits until none of the jobs has a living process."""
    while any(is_locked(job.folder) for job in jobs):
        time.sleep(POLL_S)


def unreported(jobs: Sequence[SweepJob]) -> list[SweepJob]:
    """The jobs whose process died without writing a status."""
    return [
        job
        for job in jobs
        if read_state(job.folder).status == "running" and not is_locked(job.folder)
    ]


def mark_dead(jobs: Sequence[SweepJob], status: Literal["failed", "interrupted"]) -> None:
    """Writes the status for the jobs whose process died without one."""
    for job in unreported(jobs):
        write_status(job.folder, status, "its process was killed")

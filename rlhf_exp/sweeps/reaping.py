"""What becomes of jobs whose launcher has returned, or has lost a process."""

import time
from collections.abc import Sequence
from typing import Literal

from rlhf_exp.runs.lock import is_locked
from rlhf_exp.runs.status import read_state
from rlhf_exp.sweeps.jobs import SweepJob

POLL_S = 0.5


def mark_failed(job: SweepJob, error: BaseException) -> None:
    """Marks a job failed whose launcher returned an error, unless the job has said it."""
    from rlhf_exp.runs.folder import RunFolder

    if read_state(job.folder).status in ("waiting", "running"):
        RunFolder(job.folder).write_status("failed", f"{type(error).__name__}: {error}")


def await_and_mark(jobs: Sequence[SweepJob], status: Literal["failed", "interrupted"]) -> None:
    """Waits for the jobs, and gives those the status whose process died without a word."""
    await_end(jobs)
    mark_dead(jobs, status)


def await_end(jobs: Sequence[SweepJob]) -> None:
    """Waits until none of the jobs has a living process."""
    while any(is_locked(job.folder) for job in jobs):
        time.sleep(POLL_S)


def unreported(jobs: Sequence[SweepJob]) -> list[SweepJob]:
    """The jobs whose process died without a word."""
    return [
        job
        for job in jobs
        if read_state(job.folder).status == "running" and not is_locked(job.folder)
    ]


def mark_dead(jobs: Sequence[SweepJob], status: Literal["failed", "interrupted"]) -> None:
    """Gives those the status whose process died without a word."""
    from rlhf_exp.runs.folder import RunFolder

    for job in unreported(jobs):
        RunFolder(job.folder).write_status(status, "its process was killed")

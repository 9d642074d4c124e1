"""Putting a job back into the queue that it came from. It knows SLURM."""

import logging
import os
import subprocess

log = logging.getLogger(__name__)

SECONDS = 60.0


def requeue() -> bool:
    """Has SLURM queue this job again, whose command then has to go on where it stopped; whether it
    does. Outside of SLURM nothing is done."""
    job = os.environ.get("SLURM_JOB_ID")
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    if not job:
        return False
    name = f"{array}_{task}" if array and task else job
    try:
        subprocess.run(
            ["scontrol", "requeue", name], check=True, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        log.warning("job %s could not be queued again: %s", name, str(told).strip())
        return False
    log.info("job %s is queued again", name)
    return True

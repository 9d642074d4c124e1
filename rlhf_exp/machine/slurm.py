"""Requeues the job that this process runs in. Knows SLURM."""

import logging
import os
import subprocess

log = logging.getLogger(__name__)

SECONDS = 60.0


def requeue() -> bool:
    """Requeues this SLURM job, whose command must then resume the run. Returns True if SLURM
    accepts; False outside of SLURM."""
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
        reason = getattr(error, "stderr", None) or error
        log.warning("job %s could not be queued again: %s", name, str(reason).strip())
        return False
    log.info("job %s is queued again", name)
    return True

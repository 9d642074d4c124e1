"""Leases of GPUs: a job of a sweep holds one GPU, and other jobs of the same user on this machine
wait for it, also those of another sweep.

A lease is a lock on a file, which the operating system frees when the job's process ends, however
it ends.
"""

import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from rlhf_exp.runs.config_keys import AUTO_GPUS
from rlhf_exp.runs.lock import is_held
from rlhf_exp.runs.paths import LOCK
from rlhf_exp.runs.status import LEASED
from rlhf_exp.settings import ConfigError

log = logging.getLogger(__name__)

# Environment variables of a job: the names of the GPUs that it may lease, and the jobs on each.
GPUS, JOBS_PER_GPU = "RLHF_EXP_GPUS", "RLHF_EXP_JOBS_PER_GPU"
VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL_S = 1.0


def find_gpus(gpus: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The names, as in CUDA_VISIBLE_DEVICES, of the GPUs that the setting `gpus` means; "auto" is
    all that CUDA sees, which may be none. Raises ConfigError for a name that CUDA does not see."""
    if gpus is None:
        return ()
    import torch

    variable = os.environ.get(VISIBLE)
    visible = None if variable is None else [name.strip() for name in variable.split(",")]
    if gpus == AUTO_GPUS:
        count = torch.cuda.device_count()
        return tuple(visible[:count]) if visible else tuple(map(str, range(count)))
    if visible is not None and (hidden := [name for name in gpus if name not in visible]):
        raise ConfigError(
            f"gpus: {hidden[0]} is not in {VISIBLE}={variable}: name some of these, or write"
            " gpus=auto"
        )
    os.environ[VISIBLE] = ",".join(gpus)
    try:
        count = torch.cuda.device_count()  # CUDA stops at the first name that it does not know
    finally:
        if variable is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = variable
    if count < len(gpus):
        raise ConfigError(
            f"gpus: CUDA sees no GPU {gpus[count]} on this machine; gpus=auto takes those that it"
            " sees"
        )
    return tuple(gpus)


@contextmanager
def leased_gpu(device: str) -> Iterator[None]:
    """Within the block, this process of a job holds one of the GPUs that its sweep leases and sees
    no other; waits while all are taken. Call it before CUDA starts. Does nothing if the sweep
    leases none or the job's `device` is another kind."""
    gpus = os.environ.get(GPUS, "")
    if not gpus or not device.startswith(("auto", "cuda")):
        yield
        return
    with lease(gpus.split(","), int(os.environ[JOBS_PER_GPU]), folder=lease_folder()) as gpu:
        os.environ[VISIBLE] = os.environ[LEASED] = gpu
        log.info("GPU %s is leased", gpu)
        yield


def lease_folder() -> Path:
    """The folder of this user's leases on this machine."""
    return Path(tempfile.gettempdir()) / f"rlhf_exp-{os.getuid()}" / "gpus"


@contextmanager
def lease(gpus: Sequence[str], jobs_per_gpu: int, *, folder: Path) -> Iterator[str]:
    """Holds one of the GPUs within the block, the one with the fewest jobs. Waits while each has
    `jobs_per_gpu` jobs, or as many as one of its jobs allows."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = _try_to_lease(gpus, jobs_per_gpu, folder)
    if held is None:
        log.info("waiting for a GPU: %s are taken", ", ".join(gpus))
    while held is None:
        time.sleep(POLL_S)
        held = _try_to_lease(gpus, jobs_per_gpu, folder)
    gpu, lock = held
    try:
        yield gpu
    finally:
        lock.release()


def _try_to_lease(
    gpus: Sequence[str], jobs_per_gpu: int, folder: Path
) -> tuple[str, FileLock] | None:
    with FileLock(folder / LOCK):  # nobody else takes a lease meanwhile
        taken = {gpu: _taken(gpu, folder) for gpu in gpus}
        for gpu in sorted(gpus, key=lambda gpu: len(taken[gpu])):
            if len(taken[gpu]) >= min([jobs_per_gpu, *taken[gpu].values()]):
                continue
            files = (_file(gpu, folder, f"{i}-of-{jobs_per_gpu}") for i in range(jobs_per_gpu))
            lock = FileLock(next(file for file in files if file not in taken[gpu]))
            lock.acquire(timeout=0)
            return gpu, lock
    return None


def _taken(gpu: str, folder: Path) -> dict[Path, int]:
    """The files of the leases of a GPU that are held, with the jobs that each allows on it."""
    files = folder.glob(_file(gpu, Path(), "*-of-*").name)
    return {file: int(file.stem.rpartition("-")[2]) for file in files if is_held(file)}


def _file(gpu: str, folder: Path, place: str) -> Path:
    return folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', gpu)}.{place}{LOCK}"

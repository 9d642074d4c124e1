"""Locks a run's folder, or what several processes would make at once, for one process. A lock ends
with its process, even after a crash."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf_exp.runs.paths import LOCK
from rlhf_exp.settings import ConfigError

PATIENCE_S = 2.0  # a call of `is_locked` elsewhere holds the lock for a moment

log = logging.getLogger(__name__)


@contextmanager
def await_lock(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock of the file within the block. Logs the message `busy` if it has to wait."""
    lock = FileLock(path)
    try:
        acquired = lock.acquire(timeout=0)
    except Timeout:
        log.info("%s", busy)
        acquired = lock.acquire()
    with acquired:
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks the folder within the block. Raises ConfigError if another process holds the lock."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        acquired = FileLock(path.absolute() / LOCK).acquire(timeout=PATIENCE_S)
    except Timeout as error:
        raise ConfigError(f"{path}: another process is running in this folder") from error
    with acquired:
        yield


def is_locked(path: Path) -> bool:
    """Returns True if a living process has locked the folder."""
    return (path / LOCK).is_file() and is_held(path / LOCK)


def is_held(file: Path) -> bool:
    """Returns True if a living process holds the lock of the file."""
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True

"""Which process a run's folder belongs to. A claim ends with its process, however that ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf_exp.runs.paths import LOCK
from rlhf_exp.settings import ConfigError

PATIENCE_S = 2.0  # who asks whether a folder is claimed holds the lock for a moment


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The folder is this process's own within the block. Raises ConfigError if it is another's."""
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.absolute() / LOCK)
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout as error:
        raise ConfigError(f"{path}: another process is running in this folder") from error
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a living process has claimed the folder."""
    if not (path / LOCK).is_file():
        return False
    try:
        with FileLock(path / LOCK, timeout=0):
            return False
    except Timeout:
        return True

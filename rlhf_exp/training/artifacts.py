"""Finished pieces of work that later steps and other jobs reuse, kept under the hash of what made
them.

It knows folders, hashes and locks, not what is built. A build happens in a folder of another name
that is renamed when it is complete, so whatever has the final name is finished.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


def content_hash(description: Mapping[str, Any]) -> str:
    """Hash of anything JSON can hold, key order ignored; 12 hex digits."""
    canonical = json.dumps(description, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@functools.cache
def source_hash(*paths: Path) -> str:
    """Hash of the Python files at or below the paths: the version of the code that builds. Read
    once a process, since a process goes on with the code it began with."""
    digest = hashlib.sha256()
    files = sorted(
        {f for path in paths for f in ([path] if path.is_file() else path.rglob("*.py"))}
    )
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


class ArtifactStore:
    """Artifacts by name and hash, below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, name: str, key: str) -> Path:
        """Where the artifact is once it is finished."""
        return self.root / f"{name}-{key}"

    def obtain(self, name: str, key: str, build: Callable[[Path], None]) -> Path:
        """The artifact's folder, built by `build(folder)` if it is not there yet.

        While another process builds it, waits. A build that dies leaves nothing with the final
        name, and the next one starts over.
        """
        final = self.folder(name, key)
        if final.is_dir():
            log.info("%s: reusing %s", name, final)
            return final
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / f".{final.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: another job is building it, waiting", name)
            lock.acquire()
        try:
            if final.is_dir():
                log.info("%s: reusing %s", name, final)
                return final
            log.info("%s: building", name)
            partial = self.root / f".{final.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            os.replace(partial, final)
            log.info("%s: built %s", name, final)
            return final
        finally:
            lock.release()

"""Artifacts: results that later steps and other jobs reuse, stored under the hash of their inputs.

It knows folders, hashes and locks, not what is built. A build writes to a folder with a temporary
name and renames it when it is complete, so a folder with the final name is finished. The next build
resumes from an interrupted build's folder, or removes it.
"""

import ast
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_exp.runs.files import move_whole
from rlhf_exp.runs.lock import await_lock
from rlhf_exp.settings import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]

log = logging.getLogger(__name__)


def content_hash(description: Mapping[str, Any]) -> str:
    """Hash of anything JSON can hold, key order ignored; 12 hex digits."""
    canonical = json.dumps(description, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@functools.cache
def source_hash(*files: Path) -> str:
    """Hash of the Python files and of all files of this package that they import. Cached, since a
    process keeps the code that it started with."""
    digest = hashlib.sha256()
    for file in sorted(source_closure(*files)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def source_closure(*files: Path, package: Path = PACKAGE) -> set[Path]:
    """The files and all files of the package that they import, directly or not."""
    pending, closure = list(files), set(files)
    while pending:
        tree = ast.parse(pending.pop().read_text(encoding="utf-8"))
        for name in _imported_names(tree):
            file = package.parent.joinpath(*name.split(".")).with_suffix(".py")
            if name.split(".")[0] == package.name and file.is_file() and file not in closure:
                closure.add(file)
                pending.append(file)
    return closure


def _imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


class ArtifactStore:
    """Artifacts by name and hash, below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, name: str, key: str) -> Path:
        """The folder of the finished artifact."""
        return self.root / f"{name}-{key}"

    def obtain(self, name: str, key: str, build: Callable[[Path], None]) -> Path:
        """The artifact's folder, built by `build(folder)` if it does not exist.

        Waits while another process builds it. A failed build leaves its files under the temporary
        name, and the next build continues in that folder. Raises ConfigError for a link in the
        artifact's place, since it may lead anywhere.
        """
        final = self.folder(name, key)
        partial = self.root / f".{final.name}.partial"
        for path in (final, partial):
            if path.is_symlink():
                raise ConfigError(f"{path} is a link: remove it, or name another artifacts_dir=...")
        if not final.is_dir():
            self.root.mkdir(parents=True, exist_ok=True)
            busy = f"{name}: another job is building it, waiting"
            with await_lock(self.root / f".{final.name}.lock", busy):
                if not final.is_dir():
                    log.info("%s: building", name)
                    partial.mkdir(exist_ok=True)
                    build(partial)
                    move_whole(partial, final)
                    log.info("%s: built %s", name, final)
                    return final
        log.info("%s: reusing %s", name, final)
        return final

"""Files that are whole or not there, also after the power failed."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a text in UTF-8 so that whoever reads finds the old one or the new one, and makes the
    folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Returns when the disk has the file, or the names in the folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Returns when the disk has all that is in the folder."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            sync(path)


def move_whole(partial: Path, final: Path) -> None:
    """Gives a finished folder its final name, which it never has before all of it is on the disk.
    Whatever had the name must be gone."""
    sync_tree(partial)
    os.replace(partial, final)
    sync(final.parent)

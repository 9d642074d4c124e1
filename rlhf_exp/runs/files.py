"""Files and folders written atomically, so that they are complete even after a power failure; and
JSON that may be damaged."""

import json
import os
from pathlib import Path
from typing import Any


def parse_object(text: str | bytes) -> dict[str, Any] | None:
    """The JSON object in a text; None for anything else, broken JSON included."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # includes what is not UTF-8
        return None
    return content if isinstance(content, dict) else None


def parse_row(line: str | bytes) -> dict[str, Any] | None:
    """The JSON object in a line of metrics, samples or histograms; None if it has no phase."""
    row = parse_object(line)
    phase = row.get("phase") if row else None
    return row if isinstance(phase, int) and not isinstance(phase, bool) and phase >= 0 else None


def write_whole(path: Path, text: str) -> None:
    """Writes a text atomically: readers see the old text or the new one. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Waits until the disk has the file, or the names in the folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_whole(partial: Path, final: Path) -> None:
    """Renames a finished folder to its unused final name, after all of it is on the disk."""
    for path in [*partial.rglob("*"), partial]:
        if not path.is_symlink():
            sync(path)
    os.replace(partial, final)
    sync(final.parent)

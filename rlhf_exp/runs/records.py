"""The records that a look inside a run leaves in its folder, as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_exp.runs.files import write_whole
from rlhf_exp.runs.paths import INSIDE


def record_folder(run: Path, phase: int | None) -> Path:
    """Where the records of a phase are; None: of the end of the run."""
    return run / INSIDE if phase is None else run / INSIDE / f"phase-{phase:06d}"


def write_record(folder: Path, name: str, content: Mapping[str, Any]) -> Path:
    """Writes NAME.json and returns its path. Raises ValueError for a number that is not finite."""
    path = folder / f"{name}.json"
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")
    return path

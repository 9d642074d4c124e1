"""Counts of what tests tried and what held, for the table in the docs."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "RLHF_EXP_RELIABILITY"  # environment: where the counts go; nowhere without it


def report(name: str, counts: Mapping[str, Any]) -> None:
    """Writes NAME.json, if a folder is asked for."""
    if FOLDER in os.environ:
        folder = Path(os.environ[FOLDER])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(counts) + "\n", encoding="utf-8")

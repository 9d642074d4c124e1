"""The names of a run's files, which no other package knows, and readers of the small files.

It imports only fast modules, so that a command line is read at once.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from rlhf_exp.settings import ConfigError

STATUS, RESULT, RESOLVED_CONFIG = "status.json", "result.json", "resolved_config.json"
METRICS, SAMPLES, HISTOGRAMS = "metrics.jsonl", "samples.jsonl", "histograms.jsonl"
ENVIRONMENT, LOG, RUN_ID, LOCK = "environment.txt", "train.log", "run_id.txt", ".lock"
HYDRA, CONFIG, OVERRIDES = ".hydra", ".hydra/config.yaml", ".hydra/overrides.yaml"
RESUMED = ".hydra/resumed"  # the configuration of the last resume's command line
MODEL, CHECKPOINTS, CURVES = "model", "checkpoints", "curves.png"
SNAPSHOTS = "snapshots"  # the trained weights after some phases
INSIDE = "inside"  # what scripts/inside.py writes
LIMIT = "limit.json"  # scores of the reference's completions
MADE_OF = "made_of.json"  # in an artifact: the content of its hash


def read_result(folder: Path) -> Any:
    """The content of result.json. Raises OSError or ValueError if it cannot be read."""
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def read_resolved_config(folder: Path) -> Any:
    """The configuration that a run began with, without secrets. Raises as `read_result` does."""
    return json.loads((folder / RESOLVED_CONFIG).read_text(encoding="utf-8"))


def read_environment(folder: Path) -> list[str]:
    """The lines of environment.txt. Raises OSError if it cannot be read."""
    return (folder / ENVIRONMENT).read_text(encoding="utf-8").splitlines()


def read_hydra_config(folder: Path) -> Any:
    """The configuration as it was composed, interpolations included. Raises OSError or
    yaml.YAMLError if it cannot be read."""
    return yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))


def read_overrides(folder: Path) -> list[str]:
    """The words of a run's command line. Raises ConfigError if they cannot be read."""
    try:
        lines = (folder / OVERRIDES).read_text(encoding="utf-8").splitlines()
        words = yaml.safe_load("\n".join(lines))
        usable = isinstance(words, list) and all(isinstance(word, str) for word in words)
    except (OSError, ValueError, yaml.YAMLError):
        usable = False
    if not usable:
        raise ConfigError(f"{folder / OVERRIDES} cannot be read: it holds a list of words")
    return words


def is_run(folder: Path) -> bool:
    """Returns True if a run has begun in the folder."""
    return os.path.isfile(folder / CONFIG)  # not Path's, which raises for a name that is too long


def is_unused(folder: Path) -> bool:
    """Returns True if the folder holds nothing but a log and a lock."""
    return {file.name for file in folder.iterdir()} <= {LOG, LOCK}


def last_written(run: Path) -> float:
    """When the run's status, or its configuration, was last written: seconds since the epoch."""
    files = (run / STATUS, run / CONFIG)
    return max(file.stat().st_mtime for file in files if file.exists())


def runs_below(folder: Path) -> list[Path]:
    """The folders of the runs at FOLDER/NAME/RUN."""
    return [config.parents[1] for config in folder.glob(f"*/*/{CONFIG}")]


def newest_finished(roots: Sequence[Path]) -> list[Path]:
    """The folders with a result below the roots, jobs of sweeps included, newest first."""
    patterns = ("*", "*/*", "*/sweeps/*/*")
    files = {
        file.resolve()
        for root in roots
        for pattern in patterns
        for file in root.glob(f"{pattern}/{RESULT}")
    }
    return [f.parent for f in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True)]


def forget_status(run: Path) -> None:
    """Removes a job's status, so that it counts as not started."""
    (run / STATUS).unlink(missing_ok=True)

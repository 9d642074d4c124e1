"""Snapshots of a run: the trained weights after some phases, one safetensors file each.

A checkpoint resumes a run and is superseded; snapshots are for looking at a run, and all stay.
"""

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_exp.runs.files import sync
from rlhf_exp.runs.paths import SNAPSHOTS
from rlhf_exp.settings import ConfigError

log = logging.getLogger(__name__)

NAME = re.compile(r"phase-(\d{6,})\.safetensors")


def write_snapshot(
    run: Path, phase: int, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> Path | None:
    """Writes snapshots/phase-N.safetensors below the run's folder, atomically, and returns its
    path. Warns and returns None if it cannot be written: the run is worth more."""
    path = snapshot_path(run, phase)
    partial = path.with_name(f".{path.name}.partial")
    cast = {name: w.detach().to("cpu", dtype).contiguous() for name, w in weights.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(cast, partial, metadata={"format": "pt"})
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        log.warning("the snapshot of phase %d could not be written (%s); training continues",
                    phase, str(error).partition("\n")[0])  # fmt: skip
        with contextlib.suppress(OSError):
            partial.unlink()
        return None
    return path


def snapshot_path(run: Path, phase: int) -> Path:
    """The file of a phase's snapshot, which may not exist."""
    return run / SNAPSHOTS / f"phase-{phase:06d}.safetensors"


def snapshot_phases(run: Path) -> list[int]:
    """The phases that have a snapshot, in order."""
    matches = (NAME.fullmatch(path.name) for path in (run / SNAPSHOTS).glob("phase-*"))
    return sorted(int(match[1]) for match in matches if match)


def read_snapshot(run: Path, phase: int) -> dict[str, Tensor]:
    """The weights by name, on the CPU. Raises ConfigError if the file is missing or damaged."""
    path = snapshot_path(run, phase)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path} is not a whole snapshot: {reason}") from error


def remove_snapshots(run: Path, *, after: int) -> None:
    """Removes the snapshots of later phases, which a run that goes on from there makes again, and
    what a killed run was writing."""
    for partial in (run / SNAPSHOTS).glob(".phase-*.partial"):
        partial.unlink()
    for phase in snapshot_phases(run):
        if phase > after:
            snapshot_path(run, phase).unlink()

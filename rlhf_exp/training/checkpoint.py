"""Checkpoints of a run: tensors and numbers in a folder that is complete or not there.

It knows files, not what they mean. Nothing is pickled: tensors are safetensors, numbers JSON.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_exp.settings import ConfigError

FOLDER = "checkpoints"
TENSORS, NUMBERS = "state.safetensors", "state.json"


class Checkpoint(NamedTuple):
    """What a run goes on from."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def write_checkpoint(
    run: Path, phase: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> Path:
    """Writes checkpoints/phase-N below the run's folder, removes older ones, and returns it."""
    root = run / FOLDER
    final = root / f"phase-{phase:06d}"
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(own, partial / TENSORS)
    (partial / NUMBERS).write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for _, older in _finished(run):
        if older != final:
            shutil.rmtree(older)
    return final


def has_checkpoint(run: Path) -> bool:
    """Whether a run can go on from a checkpoint."""
    return bool(_finished(run))


def newest_checkpoint(run: Path) -> Path:
    """The folder of a run's newest checkpoint. Raises ConfigError if there is none."""
    finished = _finished(run)
    if not finished:
        raise ConfigError(
            f"{run} has no checkpoint to go on from: it ended before stage.checkpoint_every phases;"
            " start it again"
        )
    return max(finished)[1]


def read_newest_checkpoint(run: Path) -> Checkpoint:
    """The newest checkpoint of a run, on the CPU. Raises ConfigError if there is none or it cannot
    be read."""
    newest = newest_checkpoint(run)
    try:
        numbers = json.loads((newest / NUMBERS).read_text(encoding="utf-8"))
        return Checkpoint(load_file(newest / TENSORS), numbers)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{newest} cannot be read: {str(error).splitlines()[0]}") from error


def _finished(run: Path) -> list[tuple[int, Path]]:
    found = []
    for path in (run / FOLDER).glob("phase-*"):
        if match := re.fullmatch(r"phase-(\d+)", path.name):
            found.append((int(match[1]), path))
    return found

"""Checkpoints of a run: folders of tensors and numbers, written atomically.

It knows files and threads, not the files' content. Nothing is pickled: tensors are safetensors,
numbers JSON, and a manifest records the size and SHA-256 of both. A damaged checkpoint is detected
and the previous one is used.
"""

import hashlib
import json
import logging
import math
import re
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_exp.machine.background import Background
from rlhf_exp.runs.files import move_whole, parse_object
from rlhf_exp.settings import ConfigError

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
TENSORS, NUMBERS, MANIFEST = "state.safetensors", "state.json", "manifest.json"
KEPT = 2  # the number of newest checkpoints that stay; the best one stays too
BROKEN = "broken-"


class Checkpoint(NamedTuple):
    """The state from which a run resumes."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


class DamagedError(Exception):
    """A checkpoint whose files differ from what was written; the message names the difference."""


def write_checkpoint(
    run: Path,
    phase: int,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    *,
    score: float | None = None,
) -> Path:
    """Writes checkpoints/phase-N below the run's folder and returns its path. Removes older ones
    except the newest and the one with the highest score. Raises OSError or SafetensorError if
    writing fails, and then leaves the others unchanged."""
    root = run / FOLDER
    final = root / f"phase-{phase:06d}"
    partial = root / f".{final.name}.partial"
    root.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(root)
    partial.mkdir()
    try:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, partial / TENSORS)
        (partial / NUMBERS).write_text(json.dumps(numbers) + "\n", encoding="utf-8")
        files = {name: _describe(partial / name) for name in (TENSORS, NUMBERS)}
        manifest = {"phase": phase, "score": score, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        _remove(final)
        move_whole(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _remove_superseded(run)
    return final


def has_checkpoint(run: Path) -> bool:
    """Returns True if a run has written a checkpoint."""
    return newest_phase(run) is not None


def newest_phase(run: Path) -> int | None:
    """The phase of a run's newest checkpoint, damaged or not; None if there is none."""
    return max((phase for phase, _ in _finished(run)), default=None)


def checkpoint_phases(run: Path) -> list[int]:
    """The phases that have a checkpoint, damaged or not, in order."""
    return sorted(phase for phase, _ in _finished(run))


def read_checkpoint_of(run: Path, phase: int) -> Checkpoint:
    """The checkpoint of a phase, on the CPU. Raises ConfigError if it is damaged."""
    path = run / FOLDER / f"phase-{phase:06d}"
    try:
        return read_checkpoint(path)
    except DamagedError as damage:
        raise ConfigError(f"{path} is damaged: {damage}") from damage


def read_newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint of a run, on the CPU; None without any checkpoint. Warns of
    damaged ones and renames them. Raises ConfigError if all are damaged."""
    damages: dict[Path, str] = {}
    for _, path in sorted(_finished(run), reverse=True):
        try:
            checkpoint = read_checkpoint(path)
        except DamagedError as damage:
            log.warning("%s is damaged (%s)", path, damage)
            damages[path] = f"{path.name}: {damage}"
            continue
        if damages:
            log.warning("resuming from an earlier checkpoint, %s", path)
        for damaged in damages:
            _set_aside(damaged)
        return checkpoint
    if damages:
        raise ConfigError(
            f"{run / FOLDER}: every checkpoint is damaged ({'; '.join(damages.values())});"
            " remove that folder to start the run from its beginning"
        )
    return None


def _set_aside(damaged: Path) -> None:
    """Renames a damaged checkpoint to an unused name."""
    names = (f"{BROKEN}{damaged.name}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 99))))
    free = (name for name in names if not damaged.with_name(name).exists())
    try:
        damaged.rename(damaged.with_name(next(free)))
    except OSError as error:
        log.warning("%s cannot be set aside: %s", damaged, error.strerror)


def read_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint, on the CPU. Raises DamagedError if it differs from what was written."""
    manifest = _read_manifest(path)
    for name in (TENSORS, NUMBERS):
        _compare(path / name, manifest["files"].get(name))
    try:
        numbers = json.loads((path / NUMBERS).read_text(encoding="utf-8"))
        return Checkpoint(load_file(path / TENSORS), numbers)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise DamagedError(str(error).partition("\n")[0]) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = parse_object((path / MANIFEST).read_bytes())
    except OSError as error:
        raise DamagedError(f"{MANIFEST}: {error.strerror}") from error
    if manifest is None or not isinstance(manifest.get("files"), dict):
        raise DamagedError(f"{MANIFEST} is no manifest")
    return manifest


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _compare(file: Path, expected: Any) -> None:
    if not isinstance(expected, dict):
        raise DamagedError(f"{MANIFEST} does not list {file.name}")
    try:
        actual = _describe(file)
    except OSError as error:
        raise DamagedError(f"{file.name}: {error.strerror}") from error
    if actual["bytes"] != (size := expected.get("bytes")):
        raise DamagedError(f"{file.name} has {actual['bytes']} bytes instead of {size}")
    if actual["sha256"] != expected.get("sha256"):
        raise DamagedError(f"{file.name} has another checksum")


def _finished(run: Path) -> list[tuple[int, Path]]:
    matches = ((re.fullmatch(r"phase-(\d+)", p.name), p) for p in (run / FOLDER).glob("phase-*"))
    return [(int(match[1]), path) for match, path in matches if match]


def _remove_superseded(run: Path) -> None:
    checkpoints = sorted(_finished(run), reverse=True)
    best = max(checkpoints, key=lambda item: (_score(item[1]), -item[0]))
    for item in checkpoints[KEPT:]:
        if item != best or _score(item[1]) == -math.inf:
            _remove(item[1])


def _score(path: Path) -> float:
    try:
        score = _read_manifest(path).get("score")
    except DamagedError:
        return -math.inf
    return score if isinstance(score, float) and math.isfinite(score) else -math.inf


def _remove(path: Path) -> None:
    """Removes a checkpoint, renaming it first: a half-removed folder never counts as one."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)  # the next write retries


def _clear_leftovers(root: Path) -> None:
    for path in (*root.glob(".phase-*.partial"), *root.glob(".phase-*.removed")):
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(run: Path) -> None:
    """Removes all checkpoints of a run that no longer needs them."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


class CheckpointWriter:
    """Writes checkpoints on a thread while training continues.

    The thread also copies the tensors that the optimizer changes, while the next rollout runs; the
    optimizer's next step waits for that copy. All other tensors are copied at once. Memory holds a
    copy of the weights and of Adam's moments until they are written. If a checkpoint cannot be
    written, a warning is logged and the earlier ones stay.
    """

    def __init__(self, run: Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        self._run, self._optimizer = run, optimizer
        self._thread = Background("checkpoint")
        self._write: Future[Path] | None = None
        self._settled = threading.Event()  # set once all tensors of the current write are copied
        self._settled.set()
        self.waited_s = 0.0  # seconds that the optimizer's steps waited for copies
        if optimizer is not None:
            self._hook = optimizer.register_step_pre_hook(lambda *_: self.wait_until_copied())

    def save(
        self,
        phase: int,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
        *,
        score: float | None = None,
    ) -> None:
        """Starts to write the tensors and numbers as they are now, after the previous write."""
        self.wait()
        resting = self._resting()
        copies = {n: t.detach().clone() for n, t in tensors.items() if id(t) not in resting}
        later = {n: t for n, t in tensors.items() if id(t) in resting}
        text = json.dumps(numbers)  # now, since the caller may change them
        self._settled.clear()

        def write() -> Path:
            try:
                all_copies = {**copies, **{name: _copy(tensor) for name, tensor in later.items()}}
            finally:
                self._settled.set()
            return write_checkpoint(self._run, phase, all_copies, json.loads(text), score=score)

        self._write = self._thread.submit(write)

    def wait(self) -> bool:
        """Waits for the current write. Returns False if it failed."""
        if self._write is None:
            return True
        # A full disk, a folder that is gone, no memory.
        error, self._write = self._write.exception(), None
        if error is None:
            return True
        reason = str(error).partition("\n")[0] or type(error).__name__
        log.warning("a checkpoint could not be written (%s); earlier ones are kept, and training"
                    " continues", reason)  # fmt: skip
        return False

    def close(self) -> None:
        """Waits, and removes the hook from the optimizer."""
        self.wait()
        if self._optimizer is not None:
            self._hook.remove()

    def _resting(self) -> set[int]:
        """The ids of the tensors that do not change before the optimizer's next step."""
        if self._optimizer is None:
            return set()
        parameters = (group["params"] for group in self._optimizer.param_groups)
        moments = (state.values() for state in self._optimizer.state.values())
        return {id(value) for values in (*parameters, *moments) for value in values}

    def wait_until_copied(self) -> None:
        """Waits until the last checkpoint no longer needs the weights."""
        began = time.perf_counter()
        self._settled.wait()
        self.waited_s += time.perf_counter() - began


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, made by numpy on this thread: torch would use more threads."""
    source = tensor.detach()
    if source.device.type != "cpu":
        return source.cpu()
    copied = torch.empty_like(source, memory_format=torch.contiguous_format)
    if source.numel():
        flat, target = (t.contiguous().view(-1).view(torch.uint8) for t in (source, copied))
        np.copyto(target.numpy(), flat.numpy())
    return copied

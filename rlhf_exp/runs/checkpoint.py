"""Checkpoints of a run: tensors and numbers in folders that are complete or not there.

It knows files and threads, not what they hold. Nothing is pickled: tensors are safetensors, numbers
JSON, and a manifest has the size and the SHA-256 of both, so that a damaged checkpoint is known for
one and the one before it serves.
"""

import hashlib
import json
import logging
import math
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_exp.runs.files import move_whole
from rlhf_exp.settings import ConfigError

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
TENSORS, NUMBERS, MANIFEST = "state.safetensors", "state.json", "manifest.json"
KEPT = 2  # the newest, beside the best
BROKEN = "broken-"


class Checkpoint(NamedTuple):
    """What a run goes on from."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


class DamagedError(Exception):
    """A checkpoint that is not what was written; the message says in what."""


def write_checkpoint(
    run: Path,
    phase: int,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    *,
    score: float | None = None,
) -> Path:
    """Writes checkpoints/phase-N below the run's folder and returns it. Of the others the newest
    and the one with the highest score stay. Raises OSError or SafetensorError if the disk does not
    take it, and then leaves the others as they were."""
    root = run / FOLDER
    final = root / f"phase-{phase:06d}"
    partial = root / f".{final.name}.partial"
    root.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(root)
    partial.mkdir()
    try:
        save_file({name: _on_cpu(tensor) for name, tensor in tensors.items()}, partial / TENSORS)
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
    """Whether a run has written a checkpoint."""
    return newest_phase(run) is not None


def newest_phase(run: Path) -> int | None:
    """The phase of a run's newest checkpoint, whole or not; None if there is none."""
    return max((phase for phase, _ in _finished(run)), default=None)


def read_newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole, on the CPU; None if it has written none yet.
    Damaged ones are warned of and set aside. Raises ConfigError if all are damaged."""
    found = sorted(_finished(run), reverse=True)
    reasons = []
    for _, path in found:
        try:
            checkpoint = read_checkpoint(path)
        except DamagedError as damage:
            log.warning("%s is damaged (%s)", path, damage)
            reasons.append(f"{path.name}: {damage}")
            continue
        if reasons:
            log.warning("going on from the one before, %s", path)
        for _, damaged in found[: len(reasons)]:
            _set_aside(damaged)
        return checkpoint
    if reasons:
        raise ConfigError(
            f"{run / FOLDER}: every checkpoint is damaged ({'; '.join(reasons)}); remove that"
            " folder, and the run starts from its beginning"
        )
    return None


def _set_aside(damaged: Path) -> None:
    """Gives a damaged checkpoint a name that no other has."""
    names = (f"{BROKEN}{damaged.name}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 99))))
    free = (name for name in names if not damaged.with_name(name).exists())
    try:
        damaged.rename(damaged.with_name(next(free)))
    except OSError as error:
        log.warning("%s cannot be set aside: %s", damaged, error.strerror)


def read_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint, on the CPU. Raises DamagedError if it is not what was written."""
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
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedError(f"no {MANIFEST}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DamagedError(f"{MANIFEST} is no manifest")
    return manifest


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _compare(file: Path, expected: Any) -> None:
    if not isinstance(expected, dict):
        raise DamagedError(f"{MANIFEST} does not know {file.name}")
    try:
        found = _describe(file)
    except FileNotFoundError as error:
        raise DamagedError(f"no {file.name}") from error
    except OSError as error:
        raise DamagedError(f"{file.name}: {error.strerror}") from error
    if found["bytes"] != expected.get("bytes"):
        told = f"{found['bytes']} bytes in place of {expected.get('bytes')}"
        raise DamagedError(f"{file.name} has {told}")
    if found["sha256"] != expected.get("sha256"):
        raise DamagedError(f"{file.name} has another checksum")


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _finished(run: Path) -> list[tuple[int, Path]]:
    found = []
    for path in (run / FOLDER).glob("phase-*"):
        if match := re.fullmatch(r"phase-(\d+)", path.name):
            found.append((int(match[1]), path))
    return found


def _remove_superseded(run: Path) -> None:
    found = sorted(_finished(run), reverse=True)
    older = found[KEPT:]
    best = max(found, key=lambda item: (_score(item[1]), -item[0]), default=None)
    for item in older:
        if item != best or _score(item[1]) == -math.inf:
            _remove(item[1])


def _score(path: Path) -> float:
    try:
        score = _read_manifest(path).get("score")
    except DamagedError:
        return -math.inf
    return score if isinstance(score, float) and math.isfinite(score) else -math.inf


def _remove(path: Path) -> None:
    """Removes a checkpoint, which loses its name first: what is half removed is none."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)  # what stays is cleared up at the next one


def _clear_leftovers(root: Path) -> None:
    for path in (*root.glob(".phase-*.partial"), *root.glob(".phase-*.removed")):
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(run: Path) -> None:
    """Removes all checkpoints below a folder that needs them no more."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


@dataclass(kw_only=True)
class _Write:
    """A checkpoint on its way: `settled` is set once nothing of it is in memory that changes."""

    thread: threading.Thread
    settled: threading.Event
    problem: Exception | None = None


class CheckpointWriter:
    """Writes checkpoints on a thread, so that training goes on.

    What the optimizer changes is copied on that thread as well, while the next rollout runs: only
    the optimizer's next step waits until that is done. All else is copied at once. A copy of the
    weights and of Adam's moments is in memory until it is written. A checkpoint that cannot be
    written is warned of; the ones before it stay.
    """

    def __init__(self, run: Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        self._run, self._optimizer = run, optimizer
        self._write: _Write | None = None
        self.waited_s = 0.0  # that steps of the optimizer waited for copies
        if optimizer is not None:
            self._hook = optimizer.register_step_pre_hook(lambda *_: self._wait_until_settled())

    def save(
        self,
        phase: int,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
        *,
        score: float | None = None,
    ) -> None:
        """Begins to write what the tensors and numbers are now, after what is still being
        written."""
        self.wait()
        resting = self._resting()
        copies = {n: t.detach().clone() for n, t in tensors.items() if id(t) not in resting}
        later = {n: t for n, t in tensors.items() if id(t) in resting}
        text = json.dumps(numbers)  # now, for the same reason
        settled = threading.Event()

        def work() -> None:
            try:
                try:
                    whole = {**copies, **{name: _copy(tensor) for name, tensor in later.items()}}
                finally:
                    settled.set()
                write_checkpoint(self._run, phase, whole, json.loads(text), score=score)
            except Exception as error:  # a full disk, a folder that is gone, no memory
                write.problem = error

        thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        write = self._write = _Write(thread=thread, settled=settled)
        thread.start()

    def wait(self) -> bool:
        """Returns when nothing is being written; whether all that was has been written."""
        if self._write is None:
            return True
        self._write.thread.join()
        problem, self._write = self._write.problem, None
        if problem is not None:
            reason = str(problem).partition("\n")[0] or type(problem).__name__
            log.warning(
                "a checkpoint could not be written (%s); those before it are kept, and training"
                " goes on", reason,
            )  # fmt: skip
        return problem is None

    def close(self) -> None:
        """Waits, and lets go of the optimizer."""
        self.wait()
        if self._optimizer is not None:
            self._hook.remove()

    def _resting(self) -> set[int]:
        """What stays as it is until the optimizer's next step."""
        return set() if self._optimizer is None else set(map(id, _held(self._optimizer)))

    def _wait_until_settled(self) -> None:
        if self._write is not None:
            began = time.perf_counter()
            self._write.settled.wait()
            self.waited_s += time.perf_counter() - began


def _held(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for moments in optimizer.state.values():
        yield from (value for value in moments.values() if isinstance(value, Tensor))


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, made by this thread alone: torch would wake others for it."""
    source = tensor.detach()
    if source.device.type != "cpu":
        return source.cpu()
    copied = torch.empty_like(source, memory_format=torch.contiguous_format)
    if source.numel():
        flat, target = (t.contiguous().view(-1).view(torch.uint8) for t in (source, copied))
        np.copyto(target.numpy(), flat.numpy())
    return copied

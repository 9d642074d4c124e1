"""Saves and restores the state of a training loop; every stage resumes through it.

Knows when to save a state and how to split it into tensors and JSON, not what it contains.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf_exp.runs.checkpoint import CheckpointWriter, read_newest_checkpoint
from rlhf_exp.runs.context import Context
from rlhf_exp.settings import ConfigError
from rlhf_exp.training.seeding import SharedRandomness

log = logging.getLogger(__name__)

FORMAT = 3  # the version of the checkpoint format; other versions are refused
TENSOR = "__tensor__"


@runtime_checkable
class Stateful(Protocol):
    """An object whose state changes from step to step. A new one built from the same settings
    continues from a loaded state exactly as the old one would."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state as nested mappings; the leaves are tensors (not copied) or JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state. Raises ConfigError if it does not fit this run."""
        ...


class Saver:
    """Saves the parts of a state every `interval` steps, at the last step, at the best so far, and
    when the run is asked to stop; with `interval` None only when asked to stop.

    A checkpoint also holds the sizes of the run's files and the global generators of Python, NumPy
    and torch, which code without a generator of its own draws from, such as a user's reward.
    """

    def __init__(
        self,
        context: Context,
        parts: Mapping[str, Stateful],
        *,
        interval: int | None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._context, self._interval = context, interval
        self._parts = {**parts, "random": SharedRandomness()}
        self._writer = CheckpointWriter(context.folder.path, optimizer)

    def restore(self) -> bool:
        """Loads the newest undamaged checkpoint of a resumed run and removes the rows written after
        it. Returns True if a checkpoint was loaded. Raises ConfigError for another format, and as
        the parts and `read_newest_checkpoint` do."""
        folder = self._context.folder
        if not self._context.resume:
            return False
        files = read_newest_checkpoint(folder.path)
        if files is None:
            log.info("no checkpoint was written yet: from the beginning")
            folder.clear()
            return False
        if files.numbers.get("format") != FORMAT:
            raise ConfigError(
                f"{folder.path}: its checkpoint has a format that this version does not read; start"
                " the run again, or finish it with the version that wrote it (see environment.txt)"
            )
        checkpoint = join_state(files.tensors, files.numbers)
        for name, part in self._parts.items():
            part.load_state_dict(checkpoint["state"][name])
        folder.rewind(checkpoint["sizes"])
        folder.keep_id(checkpoint["run_id"])
        return True

    @contextmanager
    def steps(self) -> Iterator[None]:
        """The context of the loop, which calls `step_done` after each step. On exit it waits until
        the last checkpoint is on the disk."""
        try:
            with self._context.stop.steps():
                yield
        finally:
            self._writer.close()

    def step_done(
        self, step: int, *, is_last: bool, score: float | None = None, is_best: bool = False
    ) -> None:
        """Saves if a checkpoint is due. `score` rates the state, higher is better; `is_best` says
        that it is the best so far. If a stop was requested before the last step, saves and raises
        Interrupted."""
        stop_request = None if is_last else self._context.stop.asked()
        due = self._interval is not None and (is_last or is_best or step % self._interval == 0)
        if due or stop_request is not None:
            self._save(step, score)
        if stop_request is not None:
            if self._writer.wait():
                log.info("saved after step %d", step)
            raise stop_request

    def wait_until_copied(self) -> None:
        """Waits until the last checkpoint no longer needs the weights, so that they may change
        without an optimizer step."""
        self._writer.wait_until_copied()

    def _save(self, step: int, score: float | None) -> None:
        folder = self._context.folder
        folder.sync()  # flush rows first: the checkpoint records the files' sizes
        checkpoint = {
            "format": FORMAT,
            "phase": step,
            "state": {name: part.state_dict() for name, part in self._parts.items()},
            "sizes": folder.sizes(),
            "run_id": folder.run_id,
        }
        self._writer.save(step, *split_state(checkpoint), score=score)


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a nested state by path, such as loop/network/head.weight, and the rest of the
    state as JSON values, in which {TENSOR: path} replaces each tensor."""
    tensors: dict[str, Tensor] = {}

    def split(value: Any, *path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: split(part, *path, key) for key, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        name = "/".join(path)
        assert name not in tensors, f"two tensors are called {name}"
        tensors[name] = value
        return {TENSOR: name}

    return tensors, split(state)


def join_state(tensors: Mapping[str, Tensor], numbers: Any) -> Any:
    """The state that `split_state` split."""
    if not isinstance(numbers, dict):
        return numbers
    if numbers.keys() == {TENSOR}:
        return tensors[numbers[TENSOR]]
    return {key: join_state(tensors, part) for key, part in numbers.items()}


def check_inputs(current: Mapping[str, str], saved: Mapping[str, str]) -> None:
    """Raises ConfigError naming the first field whose hash differs from the checkpoint's."""
    for field, saved_hash in saved.items():
        if current.get(field) != saved_hash:
            raise ConfigError(
                f"{field}: the files that it names have changed since the checkpoint; restore them,"
                " or start the run again"
            )

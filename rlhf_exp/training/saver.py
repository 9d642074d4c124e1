"""A loop's state, saved at its steps and brought back: what every stage shares of not losing work.

It knows when and with what beside it a state is saved, not what is in the state.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf_exp.settings import ConfigError
from rlhf_exp.training.checkpoint import CheckpointWriter, read_newest_checkpoint
from rlhf_exp.training.context import Context
from rlhf_exp.training.optim import below
from rlhf_exp.training.seeding import SharedRandomness

log = logging.getLogger(__name__)

RANDOM = "random."


@runtime_checkable
class Savable(Protocol):
    """What changes from step to step of a loop, all of it. Restored into one that is built anew
    from the same settings, it goes on as if nothing had happened."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by name, not copied."""
        ...

    def numbers(self) -> Mapping[str, Any]:
        """The rest, as JSON holds it."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Makes this the state that both were taken of. Raises ConfigError if they are of a run of
        another shape."""
        ...


class Together:
    """Several states saved and restored as one, each under its name."""

    def __init__(self, **parts: Savable) -> None:
        self._parts = parts

    def tensors(self) -> dict[str, Tensor]:
        """NAME.TENSOR of each."""
        return {
            f"{name}.{key}": tensor
            for name, part in self._parts.items()
            for key, tensor in part.tensors().items()
        }

    def numbers(self) -> dict[str, Any]:
        """Those of each by its name."""
        return {name: dict(part.numbers()) for name, part in self._parts.items()}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Restores each. Raises ConfigError as they do."""
        for name, part in self._parts.items():
            part.restore(below(tensors, f"{name}."), numbers[name])


class Saver:
    """Saves a state every so many steps, at the last one and when it is the best so far, and
    whenever the run is asked to stop. With `every` None only the latter.

    Saved along with it: how far the run's files were written and the generators that Python, NumPy
    and torch share among all that do not bring their own, such as a user's reward.
    """

    def __init__(
        self,
        context: Context,
        state: Savable,
        *,
        every: int | None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._context, self._state, self._every = context, state, every
        self._writer = CheckpointWriter(context.folder.path, optimizer)

    def restore(self) -> bool:
        """Goes on from the newest checkpoint that is whole, if the run is resumed and has one; the
        rows written after it are removed. Whether there was one. Raises ConfigError as the state
        and `read_newest_checkpoint` do."""
        folder = self._context.folder
        if not self._context.resume:
            return False
        checkpoint = read_newest_checkpoint(folder.path)
        if checkpoint is None:
            log.info("no checkpoint was written yet: from the beginning")
            folder.clear()
            return False
        numbers = checkpoint.numbers
        self._state.restore(checkpoint.tensors, numbers["state"])
        shared = {n: t for n, t in checkpoint.tensors.items() if n.startswith(RANDOM)}
        SharedRandomness(RANDOM).restore(shared, numbers["random"])
        folder.rewind(numbers["sizes"])
        folder.keep_id(numbers["run_id"])
        return True

    @contextmanager
    def steps(self) -> Iterator[None]:
        """The loop: within it each step is finished and then told to `step_done`. Leaves when the
        last checkpoint is on the disk."""
        try:
            with self._context.stop.steps():
                yield
        finally:
            self._writer.close()

    def step_done(
        self, step: int, *, is_last: bool, score: float | None = None, is_best: bool = False
    ) -> None:
        """Saves if it is time to. `score` is how good the state is known to be, the higher the
        better, and `is_best` that it is the best so far. Raises Interrupted, after saving, if a
        stop was asked for and the step was not the last."""
        asked = self._context.stop.asked()
        stops = asked is not None and not is_last
        due = self._every is not None and (is_last or is_best or step % self._every == 0)
        if due or stops:
            self._save(step, score)
        if stops:
            assert asked is not None
            if self._writer.wait():
                log.info("saved after step %d", step)
            raise asked

    def _save(self, step: int, score: float | None) -> None:
        shared = SharedRandomness(RANDOM)
        folder = self._context.folder
        folder.sync()  # what a checkpoint counts on is on the disk before it
        self._writer.save(
            step,
            {**self._state.tensors(), **shared.tensors()},
            {
                "phase": step,
                "state": dict(self._state.numbers()),
                "random": shared.numbers(),
                "sizes": folder.sizes(),
                "run_id": folder.run_id,
            },
            score=score,
        )


def check_inputs(now: Mapping[str, str], then: Mapping[str, str]) -> None:
    """Raises ConfigError if one of the hashes, which are named by the field whose files they are
    of, is another than at the checkpoint."""
    for where, known in then.items():
        if now.get(where) != known:
            raise ConfigError(
                f"{where}: what it names has changed since the checkpoint; bring it back, or"
                " start the run again"
            )

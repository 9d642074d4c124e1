"""What every supervised stage shares: the settings of its loop, and the loop itself, losses in,
updates and log lines out."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rlhf_exp.settings import Count, Index, Positive, settings
from rlhf_exp.training.context import Context, TrainingError
from rlhf_exp.training.memory import explaining_memory
from rlhf_exp.training.optim import (
    Schedule,
    below,
    check_schedule,
    clip_gradients,
    learning_rates,
    optimizer_tensors,
    restore_optimizer,
    restore_trained,
    trained_tensors,
)
from rlhf_exp.training.progress import Progress
from rlhf_exp.training.saver import Savable, Saver, check_inputs
from rlhf_exp.training.seeding import stream_seed

log = logging.getLogger(__name__)


@settings
class Supervised:
    """Settings of a supervised stage."""

    epochs: Count = 1
    batch_size: Count = 64
    max_grad_norm: Positive = 1.0
    log_every: Count = 50
    checkpoint_every: Count | None = 500
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: Index = 10

    def explaining(self, doing: str, *knobs: str) -> AbstractContextManager[None]:
        """A block in which running out of memory is told with what needs less in such a stage."""
        own = (f"lower stage.batch_size (now {self.batch_size})", "choose a smaller model")
        return explaining_memory(doing, (*knobs, *own))

    def num_updates(self, num_examples: int) -> int:
        """Updates in all epochs; the last batch of an epoch may be smaller."""
        return self.epochs * math.ceil(num_examples / self.batch_size)

    def check_updates(self, schedule: Schedule, num_examples: int) -> list[str]:
        """What is wrong between the schedule and the number of updates."""
        field = "the number of updates (stage.epochs x examples / stage.batch_size)"
        return check_schedule(schedule, total_steps=self.num_updates(num_examples), field=field)

    def fit(
        self,
        context: Context,
        state: "SupervisedState",
        losses: Iterator[Tensor],
        *,
        num_updates: int,
    ) -> None:
        """Takes at most `num_updates` losses, each computed when it is asked for, and makes an
        update of each. After an update the state's `ending` is asked whether it was the last.

        Logs train/loss, the gradient norms and the learning rates with the update's number as the
        phase. Dropout draws from the context's seed. An update whose loss or gradient is not
        finite changes neither weights nor moments: it is counted with on_nonfinite="skip", at most
        max_skipped times, and else raises TrainingError that names it, as running out of memory
        does. A resumed run goes on where its newest checkpoint was.
        """
        saver = Saver(context, state, every=self.checkpoint_every, optimizer=state.optimizer)
        with Progress(num_updates, unit="update") as progress, torch.random.fork_rng():
            torch.manual_seed(stream_seed(context.seed, "dropout"))
            if saver.restore():
                log.info("going on after update %d", state.update)
            with saver.steps():
                while state.update < num_updates and not state.ended:
                    state.update += 1
                    is_logged = state.update % self.log_every == 0 or state.update == num_updates
                    metrics = self._update(state, losses, is_logged=is_logged)
                    if is_logged:
                        context.folder.log(state.update, metrics)
                        progress.advance(state.update, metrics)
                    state.ended = state.ending(state.update)
                    is_last = state.ended or state.update == num_updates
                    saver.step_done(state.update, is_last=is_last)

    def _update(
        self, state: "SupervisedState", losses: Iterator[Tensor], *, is_logged: bool
    ) -> dict[str, float]:
        """One update; its metrics if they are going to be logged."""
        with self.explaining(f"update {state.update}: learning"):
            loss = next(losses)
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norms = clip_gradients(state.optimizer, self.max_grad_norm)
            if bool(torch.stack([loss.detach(), *norms.values()]).isfinite().all()):
                state.optimizer.step()
            else:
                state.skipped_steps += 1
                self._skip(state, loss.item(), norms)
        metrics = {}
        if is_logged:
            metrics = {"train/loss": loss.item()}
            metrics |= {f"grad_norm/{name}": norm.item() for name, norm in norms.items()}
            metrics["train/skipped_steps"] = float(state.skipped_steps)
            metrics |= {f"lr/{name}": lr for name, lr in learning_rates(state.optimizer).items()}
        state.scheduler.step()
        return metrics

    def _skip(self, state: "SupervisedState", loss: float, norms: Mapping[str, Tensor]) -> None:
        """Says that an update is left out. Raises TrainingError if it must not be."""
        fault = f"update {state.update}: the loss is {loss:g}"
        if math.isfinite(loss):
            told = ", ".join(f"{name} {norm.item():g}" for name, norm in norms.items())
            fault += f", the norm of its gradient {told}"
        if self.on_nonfinite == "stop":
            raise TrainingError(
                f"{fault}; lower optimizer.base_lr and optimizer.head_lr, or leave such updates out"
                " with stage.on_nonfinite=skip"
            )
        if state.skipped_steps > self.max_skipped:
            raise TrainingError(
                f"{fault}; that is one more than stage.max_skipped={self.max_skipped} to leave out:"
                " lower optimizer.base_lr and optimizer.head_lr"
            )
        log.warning("%s; it is left out", fault)


@runtime_checkable
class Ending(Savable, Protocol):
    """What decides after each update whether it was the last."""

    def __call__(self, update: int) -> bool:
        """Whether that was the last update."""
        ...


@runtime_checkable
class Order(Protocol):
    """Which examples come next."""

    def state(self) -> Mapping[str, Tensor]:
        """Where it stands."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from there."""
        ...


class AllUpdates:
    """Ends after the last update and not before."""

    def __call__(self, update: int) -> bool:
        """No."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def numbers(self) -> dict[str, Any]:
        """None."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Nothing to restore."""


@dataclass(kw_only=True)
class SupervisedState:
    """Everything that changes from update to update. `inputs` are hashes of what a resumed run must
    find as it was, by the field that names it."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    batches: Order
    ending: Ending = field(default_factory=AllUpdates)
    inputs: Mapping[str, str] = field(default_factory=dict)
    update: int = 0
    skipped_steps: int = 0
    ended: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Trained parameters, moments, where the order of the batches stands, and the tensors of
        what decides on the end; not copied."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "network.": trained_tensors(self.network),
            "optimizer.": optimizer_tensors(self.optimizer),
            "batches.": self.batches.state(),
            "ending.": self.ending.tensors(),
        }
        return {f"{prefix}{n}": t for prefix, part in parts.items() for n, t in part.items()}

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, as JSON holds it."""
        return {
            "update": self.update,
            "skipped_steps": self.skipped_steps,
            "ended": self.ended,
            "ending": dict(self.ending.numbers()),
            "inputs": dict(self.inputs),
        }

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Makes this the state that both were taken of. Raises ConfigError if they are of another
        model or of other inputs."""
        check_inputs(self.inputs, numbers["inputs"])
        restore_trained(self.network, below(tensors, "network."))
        self.update, self.ended = numbers["update"], numbers["ended"]
        self.skipped_steps = numbers["skipped_steps"]
        restore_optimizer(
            self.optimizer, self.scheduler, below(tensors, "optimizer."), step=self.update
        )
        self.batches.restore(below(tensors, "batches."))
        self.ending.restore(below(tensors, "ending."), numbers["ending"])

"""The training loop of all supervised stages and its settings: it turns losses into updates."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_exp.runs.context import Context, TrainingError
from rlhf_exp.settings import Count, Index, Positive, settings
from rlhf_exp.tracking.progress import Progress
from rlhf_exp.training.early_stopping import EarlyStopping
from rlhf_exp.training.optim import (
    clip_gradients,
    learning_rates,
    load_optimizer_state,
    load_trained_state,
    optimizer_state,
    trained_state,
)
from rlhf_exp.training.out_of_memory import explaining_memory
from rlhf_exp.training.saver import Saver, Stateful, check_inputs
from rlhf_exp.training.schedules import Schedule, check_schedule
from rlhf_exp.training.seeding import stream_seed
from rlhf_exp.types import LossOutput

log = logging.getLogger(__name__)


# The loss of an update; an iterator yields parts, each computed on demand, whose sum is the loss.
Loss = Tensor | LossOutput | Iterator[LossOutput]


@settings
class Supervised:
    """Settings of a supervised stage."""

    epochs: Count = 1
    """Most passes over the texts."""
    batch_size: Count = 64
    """Texts an update."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    log_every: Count = 50
    """Updates between log lines."""
    checkpoint_every: Count | None = 500
    """Updates between checkpoints, and one at the end; null: only when the run is stopped."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """stop: a loss or gradient that is not finite ends the run; skip: that update is skipped."""
    max_skipped: Index = 10
    """Most updates that a run may skip, 0-100."""

    def explaining(self, doing: str, *knobs: str) -> AbstractContextManager[None]:
        """`explaining_memory` with the settings of a supervised stage that need less memory."""
        common = (f"lower stage.batch_size (now {self.batch_size})", "choose a smaller model")
        return explaining_memory(doing, (*knobs, *common))

    def num_updates(self, num_examples: int) -> int:
        """Updates in all epochs; the last batch of an epoch may be smaller."""
        return self.epochs * math.ceil(num_examples / self.batch_size)

    def check_updates(self, schedule: Schedule, num_examples: int) -> list[str]:
        """Messages about a schedule that does not fit the number of updates."""
        field = "the number of updates (stage.epochs x examples / stage.batch_size)"
        return check_schedule(schedule, total_steps=self.num_updates(num_examples), field=field)

    def fit(
        self,
        context: Context,
        state: "SupervisedState",
        losses: Iterator[Loss],
        *,
        num_updates: int,
        measure: Callable[[int], None] | None = None,
        knobs: Sequence[str] = (),
    ) -> None:
        """Takes losses from the iterator, which computes each on demand, and makes one update for
        each: `num_updates` in all, fewer if the state's `early_stopping` ends training. Running out
        of memory is explained with `knobs`, settings that need less.

        Logs train/loss, the loss's metrics, the gradient norms and the learning rates with the
        update's number as the phase. Calls `measure` with the number of updates, before the first
        and after each. Dropout draws from the context's seed. An update whose loss or gradient is
        not finite changes neither weights nor moments. It raises TrainingError, as running out of
        memory does, unless on_nonfinite="skip" and at most max_skipped updates were skipped. A
        resumed run continues from its newest checkpoint.
        """
        parts = {"loop": state}
        saver = Saver(context, parts, interval=self.checkpoint_every, optimizer=state.optimizer)
        with Progress(num_updates, unit="update") as progress, torch.random.fork_rng():
            torch.manual_seed(stream_seed(context.seed, "dropout"))
            if saver.restore():
                log.info("going on after update %d", state.update)
            progress.start(state.update)
            if measure is not None and state.update == 0:
                measure(0)
            with saver.steps():
                while state.update < num_updates and not state.ended:
                    state.update += 1
                    is_logged = state.update % self.log_every == 0 or state.update == num_updates
                    with self.explaining(f"update {state.update}: learning", *knobs):
                        metrics = self._update(state, losses, is_logged=is_logged)
                    if is_logged:
                        context.folder.log(state.update, metrics)
                        progress.advance(state.update, metrics)
                    if measure is not None:
                        measure(state.update)
                    if state.early_stopping is not None:
                        state.ended = state.early_stopping(state.update)
                    is_last = state.ended or state.update == num_updates
                    saver.step_done(state.update, is_last=is_last)

    def _update(
        self, state: "SupervisedState", losses: Iterator[Loss], *, is_logged: bool
    ) -> dict[str, float]:
        """Makes one update. Returns its metrics if `is_logged`."""
        parts = next(losses)
        state.optimizer.zero_grad(set_to_none=True)
        output = add_gradients(parts)
        loss = output.loss
        norms = clip_gradients(state.optimizer, self.max_grad_norm)
        if bool(torch.stack([loss, *norms.values()]).isfinite().all()):
            state.optimizer.step()
        else:
            state.skipped_steps += 1
            self._skip(state, loss.item(), norms)
        metrics = {}
        if is_logged:
            metrics = {"train/loss": loss.item()}
            metrics |= {name: value.item() for name, value in output.metrics.items()}
            metrics |= {f"grad_norm/{name}": norm.item() for name, norm in norms.items()}
            metrics["train/skipped_steps"] = float(state.skipped_steps)
            metrics |= {f"lr/{name}": lr for name, lr in learning_rates(state.optimizer).items()}
        state.scheduler.step()
        return metrics

    def _skip(self, state: "SupervisedState", loss: float, norms: Mapping[str, Tensor]) -> None:
        """Logs that an update is skipped. Raises TrainingError if the settings forbid it."""
        fault = f"update {state.update}: the loss is {loss:g}"
        if math.isfinite(loss):
            by_group = ", ".join(f"{name} {norm.item():g}" for name, norm in norms.items())
            fault += f", its gradient norm {by_group}"
        if self.on_nonfinite == "stop":
            raise TrainingError(
                f"{fault}; lower optimizer.base_lr and optimizer.head_lr, or skip such updates with"
                " stage.on_nonfinite=skip"
            )
        if state.skipped_steps > self.max_skipped:
            raise TrainingError(
                f"{fault}; stage.max_skipped={self.max_skipped} updates were skipped already:"
                " lower optimizer.base_lr and optimizer.head_lr"
            )
        log.warning("%s; it is skipped", fault)


def add_gradients(loss: Loss) -> LossOutput:
    """Adds the gradients of a loss to the parameters', those of each of its parts before the next
    one is computed. Returns the loss, without gradients, and its metrics."""
    if isinstance(loss, Tensor):
        loss = LossOutput(loss=loss, metrics={})
    total: Tensor | None = None
    metrics: dict[str, Tensor] = {}
    for part in [loss] if isinstance(loss, LossOutput) else loss:
        part.loss.backward()
        total = part.loss.detach() if total is None else total + part.loss.detach()
        for name, value in part.metrics.items():
            metrics[name] = metrics[name] + value if name in metrics else value
    assert total is not None
    return LossOutput(loss=total, metrics=metrics)


@dataclass(kw_only=True)
class SupervisedState:
    """Everything that changes from update to update. `inputs` are hashes, by field, of the files
    that must be unchanged when the run is resumed."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    batches: Stateful
    early_stopping: EarlyStopping | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    update: int = 0
    skipped_steps: int = 0
    ended: bool = False

    def state_dict(self) -> dict[str, Any]:
        """Trained parameters, moments, the states of batches and early stopping, counts and
        inputs."""
        stopping = {} if self.early_stopping is None else self.early_stopping.state_dict()
        return {
            "network": trained_state(self.network),
            "optimizer": optimizer_state(self.optimizer),
            "batches": self.batches.state_dict(),
            "early_stopping": stopping,
            "update": self.update,
            "skipped_steps": self.skipped_steps,
            "ended": self.ended,
            "inputs": dict(self.inputs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state. Raises ConfigError if the model or the inputs differ."""
        check_inputs(self.inputs, state["inputs"])
        load_trained_state(self.network, state["network"])
        self.update, self.ended = state["update"], state["ended"]
        self.skipped_steps = state["skipped_steps"]
        load_optimizer_state(self.optimizer, self.scheduler, state["optimizer"], step=self.update)
        self.batches.load_state_dict(state["batches"])
        if self.early_stopping is not None:
            self.early_stopping.load_state_dict(state["early_stopping"])

"""What every supervised stage shares: the settings of its loop, and the loop itself, losses in,
updates and log lines out."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from rlhf_exp.settings import Count, Index, Positive, settings
from rlhf_exp.training.context import Context, TrainingError
from rlhf_exp.training.memory import explaining_memory
from rlhf_exp.training.optim import Schedule, check_schedule, clip_gradients, learning_rates
from rlhf_exp.training.progress import Progress
from rlhf_exp.training.seeding import stream_seed

log = logging.getLogger(__name__)


@settings
class Supervised:
    """Settings of a supervised stage."""

    epochs: Count = 1
    batch_size: Count = 64
    max_grad_norm: Positive = 1.0
    log_every: Count = 50
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
        losses: Iterator[Tensor],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        *,
        num_updates: int,
        stop: Callable[[int], bool] = lambda update: False,
    ) -> None:
        """Takes at most `num_updates` losses, each computed when it is asked for, and makes an
        update of each. After an update `stop` is asked whether it was the last.

        Logs train/loss, the gradient norms and the learning rates with the update's number as the
        phase. Dropout draws from the context's seed. An update whose loss or gradient is not
        finite changes neither weights nor moments: it is counted with on_nonfinite="skip", at most
        max_skipped times, and else raises TrainingError that names it, as running out of memory
        does.
        """
        skipped = 0
        with Progress(num_updates, unit="update") as progress, torch.random.fork_rng():
            torch.manual_seed(stream_seed(context.seed, "dropout"))
            for update in range(1, num_updates + 1):
                with self.explaining(f"update {update}: learning"):
                    loss = next(losses)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    norms = clip_gradients(optimizer, self.max_grad_norm)
                    if bool(torch.stack([loss.detach(), *norms.values()]).isfinite().all()):
                        optimizer.step()
                    else:
                        skipped += 1
                        self._skip(update, loss.item(), norms, skipped)
                if update % self.log_every == 0 or update == num_updates:
                    metrics = {"train/loss": loss.item()}
                    metrics |= {f"grad_norm/{name}": norm.item() for name, norm in norms.items()}
                    metrics["train/skipped_steps"] = float(skipped)
                    metrics |= {f"lr/{name}": lr for name, lr in learning_rates(optimizer).items()}
                    context.folder.log(update, metrics)
                    progress.advance(update, metrics)
                scheduler.step()
                if stop(update):
                    return

    def _skip(self, update: int, loss: float, norms: Mapping[str, Tensor], skipped: int) -> None:
        """Says that an update is left out. Raises TrainingError if it must not be."""
        fault = f"update {update}: the loss is {loss:g}"
        if math.isfinite(loss):
            told = ", ".join(f"{name} {norm.item():g}" for name, norm in norms.items())
            fault += f", the norm of its gradient {told}"
        if self.on_nonfinite == "stop":
            raise TrainingError(
                f"{fault}; lower optimizer.base_lr and optimizer.head_lr, or leave such updates out"
                " with stage.on_nonfinite=skip"
            )
        if skipped > self.max_skipped:
            raise TrainingError(
                f"{fault}; that is one more than stage.max_skipped={self.max_skipped} to leave out:"
                " lower optimizer.base_lr and optimizer.head_lr"
            )
        log.warning("%s; it is left out", fault)

"""What every supervised stage shares: the settings of its loop, and the loop itself, losses in,
updates and log lines out."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_exp.settings import Count, Positive, settings
from rlhf_exp.training.context import Context, TrainingError
from rlhf_exp.training.optim import Schedule, check_schedule, clip_gradients, learning_rates
from rlhf_exp.training.progress import Progress
from rlhf_exp.training.seeding import stream_seed


@settings
class Supervised:
    """Settings of a supervised stage."""

    epochs: Count = 1
    batch_size: Count = 64
    max_grad_norm: Positive = 1.0
    log_every: Count = 50

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
        phase. Dropout draws from the context's seed. Raises TrainingError naming the update if a
        loss is not finite.
        """
        with Progress(num_updates, unit="update") as progress, torch.random.fork_rng():
            torch.manual_seed(stream_seed(context.seed, "dropout"))
            for update in range(1, num_updates + 1):
                loss = next(losses)
                if not loss.isfinite():
                    raise TrainingError(
                        f"update {update}: the loss is {loss.item()}; lower optimizer.base_lr"
                        " and optimizer.head_lr"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norms = clip_gradients(optimizer, self.max_grad_norm)
                optimizer.step()
                if update % self.log_every == 0 or update == num_updates:
                    metrics = {"train/loss": loss.item()}
                    metrics |= {f"grad_norm/{name}": norm.item() for name, norm in norms.items()}
                    metrics |= {f"lr/{name}": lr for name, lr in learning_rates(optimizer).items()}
                    context.folder.log(update, metrics)
                    progress.advance(update, metrics)
                scheduler.step()
                if stop(update):
                    return

"""The loop that every supervised stage shares: losses in, updates and log lines out."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_exp.training.context import Context, TrainingError
from rlhf_exp.training.optim import clip_gradients, learning_rates
from rlhf_exp.training.progress import Progress
from rlhf_exp.training.seeding import stream_seed


def fit(
    context: Context,
    losses: Iterator[Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    num_updates: int,
    max_grad_norm: float,
    log_every: int,
) -> None:
    """Takes `num_updates` losses, each computed when it is asked for, and makes an update of each.

    Logs train/loss, the gradient norms and the learning rates with the update's number as the
    phase. Dropout draws from the context's seed. Raises TrainingError naming the update if a loss
    is not finite.
    """
    with Progress(num_updates, unit="update") as progress, torch.random.fork_rng():
        torch.manual_seed(stream_seed(context.seed, "dropout"))
        for update in range(1, num_updates + 1):
            loss = next(losses)
            if not loss.isfinite():
                raise TrainingError(
                    f"update {update}: the loss is {loss.item()}; lower optimizer.base_lr"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norms = clip_gradients(optimizer, max_grad_norm)
            optimizer.step()
            if update % log_every == 0 or update == num_updates:
                metrics = {"train/loss": loss.item()}
                metrics |= {f"grad_norm/{name}": norm.item() for name, norm in norms.items()}
                metrics |= {f"lr/{name}": lr for name, lr in learning_rates(optimizer).items()}
                context.folder.log(update, metrics)
                progress.advance(update, metrics)
            scheduler.step()

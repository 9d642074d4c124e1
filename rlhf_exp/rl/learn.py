"""The parts of step 5: minibatches, their micro-batches, and the optimizer step."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp.functional.masking import Aggregation
from rlhf_exp.rl.guards import Guards, Verdict, judge
from rlhf_exp.rl.state import TrainState
from rlhf_exp.training.optim import clip_gradients
from rlhf_exp.types import Experience, Layout


class Minibatch(NamedTuple):
    """Rows of a batch and their layout. `share` is the weight of a micro-batch in its
    minibatch."""

    experience: Experience
    layout: Layout
    share: float = 1.0


def minibatches(
    experience: Experience,
    *,
    layout: Layout,
    generator: torch.Generator,
    num_minibatches: int,
    num_passes: int,
    prepare: Callable[[Experience], Experience],
) -> Iterator[Minibatch]:
    """The rows that are learned, in `num_minibatches` parts of equal size (fewer or smaller parts
    if rows are left out), in a new random order at each pass; each part is prepared."""
    learned = torch.arange(len(layout.mask))
    if experience.learned is not None:
        learned = experience.learned.cpu().nonzero().flatten()
    for _ in range(num_passes):
        order = learned[torch.randperm(len(learned), generator=generator)]
        for index in order.tensor_split(num_minibatches):
            if len(index):
                yield Minibatch(prepare(experience[index]), layout[index])


def micro_batches(
    minibatch: Minibatch, size: int | None, *, aggregation: Aggregation = "token_mean"
) -> Iterator[Minibatch]:
    """The minibatch in parts of at most `size` rows, by default whole. Parts are weighted as the
    aggregation weights their tokens, so `size` changes memory only."""
    experience, layout, _ = minibatch
    rows = torch.arange(len(layout.mask))
    if size is None or size >= len(rows):
        yield minibatch
        return
    for index in rows.split(size):
        part = layout[index]
        share = len(index) / len(rows)
        if aggregation == "token_mean":
            share = float(part.mask.sum() / layout.mask.sum())
        yield Minibatch(experience[index], part, share)


def add_share(
    metrics: Mapping[str, Tensor], part: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Adds a part's metrics to the minibatch's metrics so far, weighted by its share."""
    return {name: metrics.get(name, 0) + share * value for name, value in part.items()}


def optimizer_step(
    state: TrainState, metrics: Mapping[str, Tensor], *, guards: Guards, max_grad_norm: float
) -> tuple[dict[str, Tensor], Verdict]:
    """Clips the gradients and takes the step unless a guard objects. Returns the metrics with the
    norms of the gradients before clipping, and policy/steps: 1 if the step was taken, else 0."""
    norms = clip_gradients(state.optimizer, max_grad_norm)
    metrics = {**metrics, **{f"grad_norm/{name}": norm for name, norm in norms.items()}}
    verdict = judge(guards, metrics)
    if verdict.take:
        state.optimizer.step()
        state.policy.weights_changed()
    taken = torch.full_like(metrics["loss/total"], verdict.take)
    return {**metrics, "policy/steps": taken}, verdict

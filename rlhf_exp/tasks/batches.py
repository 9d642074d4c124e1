"""Texts as padded batches for supervised training."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

# Batches whose texts are sorted by length together: little padding, and still a random order.
BUCKET = 50


def length_bucketed(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Batches of indices, one epoch of all of them in random order, texts of like length together.

    The last batch may be smaller.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), BUCKET * batch_size):
        bucket = sorted(order[start : start + BUCKET * batch_size], key=lengths.__getitem__)
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


def shuffled(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Batches of indices, one epoch of all of them in random order whatever their lengths.

    The last batch may be smaller.
    """
    for index in torch.randperm(len(lengths), generator=generator).split(batch_size):
        yield index.tolist()


Order = Callable[[Sequence[int], int, torch.Generator], Iterable[list[int]]]


class BatchStream(Iterator[list[int]]):
    """Batches of indices without end, an epoch after another, each in the order that `order`
    (length_bucketed, shuffled) draws from the generator when it begins."""

    def __init__(
        self, order: Order, lengths: Sequence[int], batch_size: int, generator: torch.Generator
    ) -> None:
        self.generator = generator
        self._order, self._lengths, self._batch_size = order, lengths, batch_size
        self._pending: list[list[int]] = []

    def __next__(self) -> list[int]:
        if not self._pending:
            self._pending = [*self._order(self._lengths, self._batch_size, self.generator)][::-1]
        return self._pending.pop()

    def state_dict(self) -> dict[str, Any]:
        """The batches still to come of the current epoch, the last one first, and the generator."""
        return {"pending": [*self._pending], "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where a stream of the same texts stood."""
        self._pending = [*state["pending"]]
        self.generator.set_state(state["generator"])


def pad_right(
    rows: Sequence[Sequence[int]], *, fill: int, width: int | None = None
) -> Int[Tensor, "batch seq"]:
    """The rows as one tensor, shorter ones filled up on the right to the longest, or to `width`."""
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def pad_left(rows: Sequence[Sequence[int]], *, fill: int) -> Int[Tensor, "batch seq"]:
    """The rows as one tensor, shorter ones filled up on the left."""
    width = max(map(len, rows))
    return torch.tensor([[*[fill] * (width - len(row)), *row] for row in rows])

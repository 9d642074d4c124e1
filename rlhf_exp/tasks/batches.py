"""Texts as padded batches for supervised training."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

# Batches whose texts are sorted by length together: little padding, but still a random order.
BUCKET = 50


def bucket_by_length(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """One epoch of batches of indices, in random order, with texts of similar length together.

    The last batch may be smaller.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), BUCKET * batch_size):
        bucket = sorted(order[start : start + BUCKET * batch_size], key=lengths.__getitem__)
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


def shuffle_batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """One epoch of batches of indices, in random order regardless of length.

    The last batch may be smaller.
    """
    for index in torch.randperm(len(lengths), generator=generator).split(batch_size):
        yield index.tolist()


Order = Callable[[Sequence[int], int, torch.Generator], Iterable[list[int]]]


class BatchStream(Iterator[list[int]]):
    """Endless batches of indices, epoch after epoch. At the beginning of each epoch `order`
    (bucket_by_length, shuffle_batches) draws its batches from the generator."""

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
        """The remaining batches of the current epoch, last one first, and the generator."""
        return {"pending": [*self._pending], "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the state of another stream over the same texts."""
        self._pending = [*state["pending"]]
        self.generator.set_state(state["generator"])


def pad_right(
    rows: Sequence[Sequence[int]], *, fill: int, width: int | None = None
) -> Int[Tensor, "batch seq"]:
    """The rows as one tensor, padded with `fill` on the right to `width` or the longest row."""
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def pad_left(rows: Sequence[Sequence[int]], *, fill: int) -> Int[Tensor, "batch seq"]:
    """The rows as one tensor, padded with `fill` on the left to the longest row."""
    width = max(map(len, rows))
    return torch.tensor([[*[fill] * (width - len(row)), *row] for row in rows])

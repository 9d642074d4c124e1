"""Batches of texts: every text once an epoch, like lengths together or any, padding on one side."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from rlhf_exp.tasks.batches import (
    BUCKET,
    BatchStream,
    Order,
    bucket_by_length,
    pad_left,
    pad_right,
    shuffle_batches,
)
from tests.states import assert_equal_states, through_a_file


def test_every_text_comes_once_an_epoch_in_another_order_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [i % 7 + 1 for i in range(103)]
    first, second = ([*bucket_by_length(lengths, 8, generator)] for _ in range(2))
    assert sorted(i for batch in first for i in batch) == [*range(103)]
    assert sorted(map(len, first)) == [7] + [8] * 12
    assert first != second
    assert first == [*bucket_by_length(lengths, 8, torch.Generator().manual_seed(0))]


def test_texts_of_a_batch_are_of_like_length() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 100, (BUCKET * 8,), generator=generator).tolist()
    spreads = [
        max(lengths[i] for i in batch) - min(lengths[i] for i in batch)
        for batch in bucket_by_length(lengths, 8, generator)
    ]
    assert sum(spreads) / len(spreads) < 5  # random batches of eight would spread over about 77


def test_padding_is_on_the_right() -> None:
    assert pad_right([[1, 2], [3]], fill=9).tolist() == [[1, 2], [3, 9]]


def test_padding_goes_to_the_width_that_is_asked_for() -> None:
    assert pad_right([[1, 2], [3]], fill=9, width=4).tolist() == [[1, 2, 9, 9], [3, 9, 9, 9]]
    assert pad_right([[1, 2], []], fill=9, width=2).tolist() == [[1, 2], [9, 9]]
    assert pad_right([[1, 2], [3]], fill=9).dtype == torch.long


def test_padding_on_the_left() -> None:
    assert pad_left([[1, 2, 3], [4], []], fill=9).tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert pad_left([[1], [2]], fill=9).tolist() == [[1], [2]]


def test_shuffled_batches_hold_every_text_once_an_epoch_whatever_its_length() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = list(range(400))
    first, second = ([*shuffle_batches(lengths, 8, generator)] for _ in range(2))
    assert sorted(i for batch in first for i in batch) == lengths
    assert list(map(len, first)) == [8] * 50
    assert first != second
    assert first == [*shuffle_batches(lengths, 8, torch.Generator().manual_seed(0))]
    assert list(map(len, shuffle_batches(lengths[:19], 8, generator))) == [8, 8, 3]
    # Not sorted by length: eight of 0 to 399 at random spread over 311 on average.
    spreads = [max(batch) - min(batch) for batch in first]
    assert sum(spreads) / len(spreads) > 250


@pytest.mark.parametrize("order", [bucket_by_length, shuffle_batches])
def test_a_stream_goes_on_from_anywhere_and_its_state_does_not_change(
    tmp_path: Path, order: Order
) -> None:
    def stream(seed: int) -> BatchStream:
        return BatchStream(order, [1, 2] * 5, 3, torch.Generator().manual_seed(seed))

    every = [*islice(stream(0), 16)]
    for taken in range(8):
        first, second, third = stream(0), stream(9), stream(9)
        assert [*islice(first, taken)] == every[:taken]
        next(second)
        state = first.state_dict()
        saved = through_a_file(state, tmp_path)
        assert [*islice(first, 8)] == every[taken : taken + 8]
        assert_equal_states(state, saved)
        for other in (second, third):
            other.load_state_dict(state)
            assert [*islice(other, 8)] == every[taken : taken + 8]

"""Batches of texts: every text once an epoch, like lengths together, padding on the right."""

import torch

from rlhf_exp.tasks.batches import BUCKET, length_bucketed, pad_right


def test_every_text_comes_once_an_epoch_in_another_order_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [i % 7 + 1 for i in range(103)]
    first, second = ([*length_bucketed(lengths, 8, generator)] for _ in range(2))
    assert sorted(i for batch in first for i in batch) == [*range(103)]
    assert sorted(map(len, first)) == [7] + [8] * 12
    assert first != second
    assert first == [*length_bucketed(lengths, 8, torch.Generator().manual_seed(0))]


def test_texts_of_a_batch_are_of_like_length() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 100, (BUCKET * 8,), generator=generator).tolist()
    spreads = [
        max(lengths[i] for i in batch) - min(lengths[i] for i in batch)
        for batch in length_bucketed(lengths, 8, generator)
    ]
    assert sum(spreads) / len(spreads) < 5  # random batches of eight would spread over about 77


def test_padding_is_on_the_right() -> None:
    assert pad_right([[1, 2], [3]], fill=9).tolist() == [[1, 2], [3, 9]]

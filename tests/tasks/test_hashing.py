"""A split by hash: the text alone decides, in every process the same."""

import hashlib

import pytest

from rlhf_exp.tasks.hashing import hash_fraction, held_out_keys


def test_it_is_the_first_48_bits_of_sha256_as_a_fraction():
    for text in ("", "a", "ü 7", "0 Problem(start=1, difference=2, terms=5)"):
        bits = bin(int(hashlib.sha256(text.encode("utf-8")).hexdigest(), 16))[2:].zfill(256)[:48]
        by_hand = sum(int(bit) / 2 ** (i + 1) for i, bit in enumerate(bits))
        assert hash_fraction(text) == by_hand
    # SHA-256 of nothing begins with e3b0c44298fc.
    assert hash_fraction("") == 0xE3B0C44298FC / 2**48


def test_it_looks_uniform():
    values = [hash_fraction(f"text {i}") for i in range(4000)]
    assert all(0 <= value < 1 for value in values)
    # Four standard errors of a tenth in 4000: 0.019.
    for tenth in range(10):
        share = sum(int(10 * value) == tenth for value in values) / 4000
        assert share == pytest.approx(0.1, abs=0.019)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [
        (12, 0.34, 4),
        (12, 0.1, 1),
        (4, 0.1, 1),
        (25, 0.1, 3),
        (12, 0.99, 11),
        (12, 1.0, 12),
        (1, 0.1, 1),
        (39, 0.5, 20),
    ],
)
def test_of_few_keys_as_many_are_held_out_as_come_nearest(seed, count, fraction, expected):
    keys = [f"{seed} {i}" for i in range(count)]
    chosen = held_out_keys(keys * 2, fraction)
    assert len(chosen) == expected
    assert chosen == set(sorted(keys, key=hash_fraction)[:expected])


def test_of_many_keys_the_hash_of_each_decides_and_one_is_held_out_at_least():
    keys = [f"text {i}" for i in range(40)]
    assert held_out_keys(keys, 0.25) == {key for key in keys if hash_fraction(key) < 0.25}
    assert held_out_keys(keys, 1e-9) == {min(keys, key=hash_fraction)}

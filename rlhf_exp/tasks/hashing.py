"""Splits by a hash of each text, so that they do not change when other texts are added."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rlhf_exp.tasks.protocol import Split

T = TypeVar("T")
FEW = 40  # with fewer keys, the share of hashes below the fraction is too inaccurate


def hash_fraction(text: str) -> float:
    """A pseudo-random number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def split_by_keys(items: Sequence[T], keys: Sequence[str], fraction: float) -> Split[T]:
    """The items in their order, those with `held_out_keys` held out."""
    chosen = held_out_keys(keys, fraction)
    pairs = list(zip(items, keys, strict=True))
    return Split(
        train=tuple(item for item, key in pairs if key not in chosen),
        held_out=tuple(item for item, key in pairs if key in chosen),
    )


def held_out_keys(keys: Iterable[str], fraction: float) -> set[str]:
    """The keys whose hash is below the fraction, at least one.

    With fewer than 40 distinct keys, the keys with the lowest hashes, in the number nearest to the
    fraction; at least one is not held out unless the fraction is 1. New keys can then move others.
    """
    ordered = sorted(set(keys), key=hash_fraction)
    if len(ordered) < FEW:
        count = int(fraction * len(ordered) + 0.5)
        count = count if fraction == 1 else min(count, len(ordered) - 1)
    else:
        count = sum(hash_fraction(key) < fraction for key in ordered)
    return set(ordered[: max(1, count)])

"""Splits that a text alone decides, so that they do not change when other texts are added."""

import hashlib
from collections.abc import Iterable

FEW = 40  # of fewer keys, the number that hashes alone would choose is far from the fraction


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that looks random and that the text alone decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def held_out_keys(keys: Iterable[str], fraction: float) -> set[str]:
    """The keys whose hash is below the fraction, at least one.

    Of fewer than 40 distinct keys, as many as come nearest to the fraction, those with the lowest
    hashes; at least one remains unless the fraction is 1. Further keys can then move others.
    """
    ordered = sorted(set(keys), key=hash_fraction)
    if len(ordered) < FEW:
        count = int(fraction * len(ordered) + 0.5)
        count = count if fraction == 1 else min(count, len(ordered) - 1)
    else:
        count = sum(hash_fraction(key) < fraction for key in ordered)
    return set(ordered[: max(1, count)])

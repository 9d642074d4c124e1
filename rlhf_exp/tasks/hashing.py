"""Splits that a text alone decides, so that they do not change when other texts are added."""

import hashlib


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that looks random and that the text alone decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48

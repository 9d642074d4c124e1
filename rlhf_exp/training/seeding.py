"""Independent streams of randomness from one seed, so that drawing more of one changes no other."""

import hashlib

import torch


def stream_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def stream(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose (sampling, minibatches, evaluation ...) on the device."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, purpose))

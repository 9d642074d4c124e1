"""Independent random streams from one seed: drawing more from one does not change another."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def stream_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def make_generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose (sampling, minibatches, evaluation ...) on the device."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, purpose))


def seed_shared_generators(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch. This package does not draw from them,
    but a user's reward may."""
    value = stream_seed(seed, "shared")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


class SharedRandomness:
    """The global generators of Python, NumPy and torch, torch's on all devices in use."""

    def state_dict(self) -> dict[str, Any]:
        """The states of the generators."""
        version, words, gauss = random.getstate()
        kind, keys, *rest = np.random.get_state(legacy=True)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {
            "python": [version, list(words), gauss],
            "numpy": [kind, np.asarray(keys).tolist(), *rest],
            "cpu": torch.get_rng_state(),
            "cuda": {str(index): state for index, state in enumerate(cuda)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the generators, except those of devices that this machine lacks."""
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state["cpu"])
        for index in range(torch.cuda.device_count()):
            if str(index) in state["cuda"]:
                torch.cuda.set_rng_state(state["cuda"][str(index)], index)

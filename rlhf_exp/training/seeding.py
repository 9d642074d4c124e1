"""Independent streams of randomness from one seed, so that drawing more of one changes no other."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def stream_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def stream(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose (sampling, minibatches, evaluation ...) on the device."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, purpose))


def seed_shared_generators(seed: int) -> None:
    """Seeds the generators that Python, NumPy and torch share among all code of a process: nothing
    here draws from them, but a user's reward may."""
    value = stream_seed(seed, "shared")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


class SharedRandomness:
    """Where the generators stand that Python, NumPy and torch share, the latter on all devices in
    use. Tensors' names begin with `prefix`."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix

    def tensors(self) -> dict[str, Tensor]:
        """torch's states, uint8."""
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            states |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
        return {f"{self._prefix}{name}": state for name, state in states.items()}

    def numbers(self) -> dict[str, Any]:
        """Python's and NumPy's states, as JSON holds them."""
        version, words, gauss = random.getstate()
        kind, keys, *rest = np.random.get_state(legacy=True)
        return {
            "python": [version, list(words), gauss],
            "numpy": [kind, np.asarray(keys).tolist(), *rest],
        }

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Has the generators go on from there. Those of devices that this machine does not have
        are left out."""
        version, words, gauss = numbers["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, *rest = numbers["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(tensors[f"{self._prefix}cpu"])
        for index in range(torch.cuda.device_count()):
            if (state := tensors.get(f"{self._prefix}cuda.{index}")) is not None:
                torch.cuda.set_rng_state(state, index)

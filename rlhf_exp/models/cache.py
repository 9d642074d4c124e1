"""Key-value caches whose memory is taken once, for all the tokens that will come."""

import functools
from typing import Any

from torch import Tensor

from rlhf_exp.hf import Cache, PreTrainedModel
from rlhf_exp.models.policy import prompt_cache


def preallocated_cache(model: PreTrainedModel, length: int) -> Cache:
    """An empty cache for `length` tokens. It grows by being written to, where transformers' own
    copies all that it holds at each token; models whose layers keep something else get theirs."""
    from transformers import DynamicCache

    cache = prompt_cache(model)
    if cache is None:
        return DynamicCache(config=model.config)
    cache.layers = [_preallocated_layer()(length) for _ in cache.layers]
    return cache


@functools.cache
def _preallocated_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
        """`keys` and `values` are the written parts of buffers for `length` tokens."""

        def __init__(self, length: int) -> None:
            super().__init__()
            self._length = length

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            seen = self.get_seq_length()
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._take(key_states, value_states)
            end = seen + key_states.shape[2]
            assert end <= self._length, "more tokens than the cache was made for"
            self._buffers[0][:, :, seen:end] = key_states
            self._buffers[1][:, :, seen:end] = value_states
            self._show(end)
            return self.keys, self.values

        def batch_repeat_interleave(self, repeats: int) -> None:
            self._become(
                self.keys.repeat_interleave(repeats, dim=0),
                self.values.repeat_interleave(repeats, dim=0),
            )

        def batch_select_indices(self, indices: Tensor) -> None:
            self._become(self.keys[indices], self.values[indices])

        def _become(self, keys: Tensor, values: Tensor) -> None:
            seen = keys.shape[2]
            self._take(keys, values)
            self._buffers[0][:, :, :seen] = keys
            self._buffers[1][:, :, :seen] = values
            self._show(seen)

        def _take(self, keys: Tensor, values: Tensor) -> None:
            self._buffers = [
                x.new_empty((*x.shape[:2], self._length, x.shape[3])) for x in (keys, values)
            ]

        def _show(self, end: int) -> None:
            self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)

    return PreallocatedLayer


def static_layer(keys: Tensor, values: Tensor, length: int, slot: Tensor) -> Any:
    """A cache layer of `length` slots for keys and values like the given ones. Each update writes
    to the slot that the tensor `slot` [1] names, and returns all of them."""
    layer = _static_layer()(slot)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = (
        x.new_zeros((*x.shape[:2], length, x.shape[3])) for x in (keys, values)
    )
    return layer


@functools.cache
def _static_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    class StaticLayer(DynamicLayer):  # type: ignore[misc]
        """All of `keys` and `values` is always shown; a mask has to say what counts."""

        def __init__(self, slot: Tensor) -> None:
            super().__init__()
            self._slot = slot

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            self.keys.index_copy_(2, self._slot, key_states)
            self.values.index_copy_(2, self._slot, value_states)
            return self.keys, self.values

    return StaticLayer

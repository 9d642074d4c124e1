"""Key-value caches that allocate their memory once, and the context length of a model."""

import copy
import functools
from typing import Any

from torch import Tensor

from rlhf_exp.hf import Cache, PreTrainedModel
from rlhf_exp.settings import ConfigError


def context_len(model: PreTrainedModel) -> int:
    """The longest sequence, in tokens, that a model computes like its shorter parts.

    Some rotary embeddings (longrope, dynamic) rotate all positions differently once a sequence
    exceeds the length of the original training: a cache, or rows of one batch, would then
    disagree. Raises ConfigError for an architecture that names no length.
    """
    return config_context_len(model.config.get_text_config(), type(model).__name__)


def config_context_len(config: Any, name: str) -> int:
    """`context_len` from the text part of the configuration of the architecture `name`."""
    longest = getattr(config, "max_position_embeddings", None)
    if not longest:
        raise ConfigError(
            f"model: {name} does not say how many tokens it attends to"
            " (max_position_embeddings); this architecture is not supported"
        )
    rotary = getattr(config, "rope_parameters", None) or {}
    by_layer = [entry for entry in rotary.values() if isinstance(entry, dict)]
    switches = [
        entry.get("original_max_position_embeddings")
        for entry in (rotary, *by_layer)
        if entry.get("rope_type") in ("longrope", "dynamic")
    ]
    return min([int(longest), *(int(switch) for switch in switches if switch)])


def prompt_cache(model: PreTrainedModel) -> Cache | None:
    """An empty cache whose layers keep all keys and values, None for a model whose layers do not
    (sliding windows, recurrent states)."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def repeated(cache: Cache, rows: int) -> Cache:
    """The content of a one-row `prompt_cache` for `rows` rows. It shares the memory of `cache`,
    which stays as it is when further tokens are added."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in other.layers:
        layer.keys = layer.keys.expand(rows, -1, -1, -1)
        layer.values = layer.values.expand(rows, -1, -1, -1)
    return other


def decoding_cache(model: PreTrainedModel, length: int) -> Cache:
    """An empty cache for `length` tokens, which appends in place; transformers' DynamicCache copies
    all of its content at each token, but is used for models without a `prompt_cache`."""
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
            start = self.get_seq_length()
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._allocate(key_states, value_states)
            self._write(start, key_states, value_states)
            return self.keys, self.values

        def reorder_cache(self, index: Tensor) -> None:
            keys, values = self.keys[index], self.values[index]
            self._allocate(keys, values)
            self._write(0, keys, values)

        def _allocate(self, keys: Tensor, values: Tensor) -> None:
            self._buffers = [
                x.new_empty((*x.shape[:2], self._length, x.shape[3])) for x in (keys, values)
            ]

        def _write(self, start: int, keys: Tensor, values: Tensor) -> None:
            end = start + keys.shape[2]
            assert end <= self._length, "more tokens than the cache was made for"
            self._buffers[0][:, :, start:end] = keys
            self._buffers[1][:, :, start:end] = values
            self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)

    return PreallocatedLayer


def static_cache(model: PreTrainedModel, cache: Cache, length: int, slot: Tensor) -> Cache:
    """A cache of `length` slots a layer; the first slots hold the content of `cache`. Each update
    writes to the slot whose index is in the tensor `slot` [1], and returns all slots. Only for
    models with a `prompt_cache`."""
    static = prompt_cache(model)
    assert static is not None
    static.layers = []
    for layer in cache.layers:
        fixed = _static_layer()(slot)
        fixed.lazy_initialization(layer.keys, layer.values)
        fixed.keys, fixed.values = (
            x.new_zeros((*x.shape[:2], length, x.shape[3])) for x in (layer.keys, layer.values)
        )
        static.layers.append(fixed)
    fill_static_cache(static, cache)
    return static


def fill_static_cache(static: Cache, cache: Cache) -> None:
    """Copies the content of `cache` to the first slots of a static cache with as many rows."""
    for fixed, layer in zip(static.layers, cache.layers, strict=True):
        end = layer.keys.shape[2]
        fixed.keys[:, :, :end] = layer.keys
        fixed.values[:, :, :end] = layer.values


@functools.cache
def _static_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    class StaticLayer(DynamicLayer):  # type: ignore[misc]
        """Always returns all of `keys` and `values`; a mask must hide the unwritten slots."""

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

"""A preallocated cache gives what transformers' own gives, through all that decoding does."""

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from rlhf_exp.models.cache import decoding_cache
from rlhf_exp.models.policy import TransformerWithValueHead
from tests.builders import assert_near, ragged_tokens, sliding_policy, tiny_policy

TOKENS, MASK = ragged_tokens(4, 9)
TOKENS = torch.where(TOKENS == 0, 5, TOKENS)


def dynamic_cache(policy: TransformerWithValueHead) -> hf.DynamicCache:
    return hf.DynamicCache(config=policy.language_model.config)


@torch.no_grad()
def decoded(policy: TransformerWithValueHead, cache: hf.DynamicCache) -> list[Tensor]:
    """The hidden states of a prompt of one row that becomes four, decoded with rows leaving."""
    seen = [policy.hidden_states(TOKENS[:1, :4], None, cache)]
    cache.reorder_cache(torch.zeros(4, dtype=torch.long))
    seen.append(policy.hidden_states(TOKENS[:, 4:5], None, cache))
    seen.append(policy.hidden_states(TOKENS[:, 5:6], None, cache))
    for rows, column in (([3, 1, 2], 6), ([2, 0], 7), ([0], 8)):
        cache.reorder_cache(torch.tensor(rows))
        seen.append(policy.hidden_states(TOKENS[rows, column : column + 1], None, cache))
    return seen


def test_it_decodes_as_transformers_cache_does(architecture: str) -> None:
    policy = tiny_policy(architecture)
    caches = [decoding_cache(policy.language_model, 9), dynamic_cache(policy)]
    ours, expected = (decoded(policy, cache) for cache in caches)
    for one, other in zip(ours, expected, strict=True):
        assert_near(one, other, tolerance=1e-6)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert one.get_seq_length() == other.get_seq_length() == 9
        assert_near(one.keys, other.keys, tolerance=1e-6)
        assert_near(one.values, other.values, tolerance=1e-6)


def test_padded_prompts_and_several_tokens_at_once(architecture: str) -> None:
    policy = tiny_policy(architecture)
    with torch.no_grad():
        whole = policy.hidden_states(TOKENS, MASK)
        cache = decoding_cache(policy.language_model, 20)  # longer than is needed
        pieces = [
            policy.hidden_states(TOKENS[:, start:end], MASK[:, :end], cache)
            for start, end in ((0, 5), (5, 8), (8, 9))
        ]
    assert_near(torch.cat(pieces, dim=1)[MASK], whole[MASK])


def test_rows_go_where_the_index_says() -> None:
    policy = tiny_policy()
    with torch.no_grad():
        cache = decoding_cache(policy.language_model, 6)
        policy.hidden_states(TOKENS[:2, :4], None, cache)
        keys = cache.layers[0].keys.clone()
        cache.reorder_cache(torch.tensor([0, 0, 1, 1]))
    assert torch.equal(cache.layers[0].keys, keys[[0, 0, 1, 1]])


def test_memory_is_taken_once() -> None:
    policy = tiny_policy()
    cache = decoding_cache(policy.language_model, 9)
    addresses = set()
    with torch.no_grad():
        for column in range(9):
            policy.hidden_states(TOKENS[:, column : column + 1], None, cache)
            for layer in cache.layers:
                assert layer.keys.shape == (4, 2, column + 1, 8)
                addresses |= {layer.keys.data_ptr(), layer.values.data_ptr()}
    assert len(addresses) == 2 * len(cache.layers)


def test_more_tokens_than_it_was_made_for_are_refused() -> None:
    policy = tiny_policy()
    cache = decoding_cache(policy.language_model, 3)
    with torch.no_grad():
        policy.hidden_states(TOKENS[:, :3], None, cache)
        with pytest.raises(AssertionError, match="more tokens than the cache was made for"):
            policy.hidden_states(TOKENS[:, 3:4], None, cache)


def test_layers_that_keep_something_else_keep_their_cache() -> None:
    policy = sliding_policy()
    cache = decoding_cache(policy.language_model, 9)
    assert all(layer.is_sliding for layer in cache.layers)
    for one, other in zip(
        decoded(policy, cache), decoded(policy, dynamic_cache(policy)), strict=True
    ):
        assert torch.equal(one, other)
    kept = decoding_cache(tiny_policy().language_model, 9)
    assert all(isinstance(layer, DynamicLayer) for layer in kept.layers)

"""Gradient checkpointing: blocks run again in the backward pass, and nothing else changes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from torch import Tensor

from rlhf_exp.models.finetune import Full, LastLayers, Lora
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.settings import ConfigError
from tests.architectures import ARCHITECTURES, build
from tests.builders import build_tokenizer, prompts, ragged_tokens, tiny_policy
from tests.rollout.oracles import RAGGED

TOKENS, MASK = ragged_tokens()
KINDS = {
    "full": Full(),
    "last_layers": LastLayers(num_layers_unfrozen=1),
    "lora": Lora(),
}


def gradients(policy: TransformerWithValueHead) -> dict[str, Tensor]:
    policy.zero_grad()
    logits, values = policy(TOKENS, MASK)
    (logits.log_softmax(dim=-1)[..., 5][MASK].sum() + values[MASK].square().sum()).backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@contextmanager
def counted(policy: TransformerWithValueHead) -> Iterator[Counter[int]]:
    """How often the MLP of each block runs."""
    calls: Counter[int] = Counter()
    base = policy.language_model.base_model
    blocks = base.h if hasattr(base, "h") else base.layers
    hooks = [
        block.mlp.register_forward_pre_hook(lambda module, args, i=i: calls.update([i]))
        for i, block in enumerate(blocks)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_bit_by_bit(architecture: str, kind: str) -> None:
    # With dropouts, which must stay off.
    policy, plain = tiny_policy(architecture, dropout=0.3), tiny_policy(architecture)
    for each in (policy, plain):
        KINDS[kind].attach(each, seed=0)
    policy.checkpoint_gradients()
    policy.train()
    with counted(plain) as calls:
        expected = gradients(plain)
    assert calls == {0: 1, 1: 1}
    with counted(policy) as calls:
        seen = gradients(policy)
    # What is below all that is trained has no activations to keep.
    assert calls == ({0: 1, 1: 2} if kind == "last_layers" else {0: 2, 1: 2})
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(seen[name], gradient), name
    assert max(gradient.abs().max() for gradient in seen.values()) > 0.1
    assert not any(module.training for module in policy.language_model.modules())


def test_sampling_keeps_its_cache(architecture: str) -> None:
    policy, plain = tiny_policy(architecture), tiny_policy(architecture)
    policy.checkpoint_gradients()
    sampler = CachedSampler(gen_len=4)
    generations, counts = [], []
    for each in (policy, plain):
        with counted(each) as calls:
            batch = prompts(each, RAGGED)
            generations.append(sampler(each, batch, torch.Generator().manual_seed(0)))
        counts.append(calls)
    assert counts[0] == counts[1] == {0: 4, 1: 4}
    assert torch.equal(generations[0].completions.tokens, generations[1].completions.tokens)
    assert torch.equal(generations[0].hidden, generations[1].hidden)


def test_a_cache_is_filled_where_gradients_are_on_too(architecture: str) -> None:
    policy = tiny_policy(architecture)
    whole = policy.hidden_states(TOKENS, MASK)
    policy.checkpoint_gradients()
    cache = hf.DynamicCache(config=policy.language_model.config)
    pieces = [
        policy.hidden_states(TOKENS[:, start:end], MASK[:, :end], cache)
        for start, end in ((0, 8), (8, 9))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1)[MASK], whole[MASK], rtol=0, atol=1e-4)


def test_a_call_that_fails_leaves_no_trace() -> None:
    policy = tiny_policy()
    policy.checkpoint_gradients()
    with pytest.raises(IndexError):
        policy(TOKENS + 100, MASK)
    assert not any(module.training for module in policy.language_model.modules())
    with torch.no_grad(), counted(policy) as calls:
        policy(TOKENS, MASK)
    assert calls == {0: 1, 1: 1}


def shape(cls: type, **more: object) -> hf.PreTrainedModel:
    config = cls(vocab_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more)
    return hf.AutoModelForCausalLM.from_config(config)


def test_dropouts_of_the_blocks_themselves_stay_off() -> None:
    # OPT's blocks look at their own flag, the one that has transformers recompute them.
    torch.manual_seed(0)
    model = shape(
        hf.OPTConfig, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.5,
    )  # fmt: skip
    policy = TransformerWithValueHead(model, build_tokenizer())
    expected = gradients(policy)
    policy.checkpoint_gradients()
    seen = gradients(policy)
    for name, gradient in expected.items():
        assert torch.equal(seen[name], gradient), name


# Zamba2 has a block within a block; others hold experts, recurrences, inputs of their own.
DIFFERENT = ("zamba2", "gemma3n", "jamba", "mixtral", "qwen3_next", "mamba2")
NOT_TAKEN_APART = {"bert", "llama4"}  # refused before


def assert_recomputed(name: str) -> None:
    policy = TransformerWithValueHead(build(name), build_tokenizer())
    expected = gradients(policy)
    policy.checkpoint_gradients()
    seen = gradients(policy)
    assert seen.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert torch.equal(seen[parameter], gradient), parameter


@pytest.mark.parametrize("name", DIFFERENT)
def test_gradients_are_the_same_whatever_a_block_holds(name: str) -> None:
    assert_recomputed(name)


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - NOT_TAKEN_APART - {*DIFFERENT}))
def test_gradients_are_the_same_on_every_architecture(name: str) -> None:
    assert_recomputed(name)


def test_an_architecture_that_cannot_recompute_is_refused() -> None:
    model = shape(hf.OpenAIGPTConfig, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    policy = TransformerWithValueHead(model, build_tokenizer())
    message = r"^gradient_checkpointing=true: OpenAIGPTLMHeadModel has no .* false$"
    with pytest.raises(ConfigError, match=message):
        policy.checkpoint_gradients()

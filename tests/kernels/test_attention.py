"""Kernels that stand in for transformers': the same numbers, and nothing of them in a save."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_exp.kernels.attention import ATTENTION, SHORT, attention, install_kernels
from rlhf_exp.models.policy import TransformerWithValueHead
from tests.builders import assert_near, build_tokenizer, ragged_tokens, stretch, tiny_policy

TOKENS, MASK = ragged_tokens()
BATCH, D_HEAD = 3, 5


class Layer(nn.Module):
    """What transformers' attention layers tell their kernel."""

    def __init__(self, *, groups: int = 1, is_causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = is_causal


def inputs(
    heads: int, kv_heads: int, seq: int, keys: int, *, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, seq, D_HEAD), (kv_heads, keys, D_HEAD), (kv_heads, keys, D_HEAD))
    return [
        torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]


def random_mask(*shape: int) -> Tensor:
    """About half; every query attends to something."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] |= ~mask.any(dim=-1)
    return mask


def causal_mask(seq: int, keys: int) -> Tensor:
    """The last query sees all keys, each one before it one less."""
    return torch.tensor([[k <= keys - seq + q for k in range(keys)] for q in range(seq)])


def by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options) -> Tensor:
    mixed = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True, **options
    )
    return mixed.transpose(1, 2)


class Operations(TorchDispatchMode):
    """Keeps the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def are_torchs_attention(self) -> bool:
        return any("scaled_dot_product" in name for name in self.names)


HEADS = [(4, 4), (4, 2), (6, 2), (4, 1)]
LENGTHS = [(6, 6), (1, 7), (3, 7), (1, 1)]
MASKS = {
    "none": lambda heads, seq, keys: None,
    "all rows": lambda heads, seq, keys: random_mask(1, 1, seq, keys),
    "a row": lambda heads, seq, keys: random_mask(BATCH, 1, seq, keys),
    "a head": lambda heads, seq, keys: random_mask(1, heads, seq, keys),
    "a row and head": lambda heads, seq, keys: random_mask(BATCH, heads, seq, keys),
}


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("seq", "keys"), LENGTHS)
@pytest.mark.parametrize("kind", MASKS)
def test_attention_is_torchs(kind: str, heads: int, kv_heads: int, seq: int, keys: int) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(heads, kv_heads, seq, keys))
    mask = MASKS[kind](heads, seq, keys)
    layer = Layer(groups=heads // kv_heads)
    with Operations() as ours:
        mixed, weights = attention(layer, query, key, value, mask)
    assert not ours.are_torchs_attention
    assert weights is None
    seen = causal_mask(seq, keys) if mask is None else mask
    expected = by_torch(query, key, value, seen)
    torch.testing.assert_close(mixed, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
    gradients = (
        torch.autograd.grad((x * direction).sum(), (query, key, value)) for x in (mixed, expected)
    )
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other)


def test_attention_that_is_not_causal() -> None:
    query, key, value = inputs(2, 2, 4, 4)
    expected = by_torch(query, key, value, None)
    for layer, is_causal in ((Layer(is_causal=False), None), (Layer(), False)):
        mixed, _ = attention(layer, query, key, value, None, is_causal=is_causal)
        torch.testing.assert_close(mixed, expected)
    causal = by_torch(query, key, value, causal_mask(4, 4))
    mixed, _ = attention(Layer(is_causal=False), query, key, value, None, is_causal=True)
    torch.testing.assert_close(mixed, causal)
    assert (causal - expected).abs().max() > 0.1


@pytest.mark.parametrize("seq", [1, 4])
def test_the_scale_can_be_given(seq: int) -> None:
    query, key, value = inputs(4, 2, seq, 4)
    mixed, _ = attention(Layer(groups=2), query, key, value, None, scaling=0.2)
    torch.testing.assert_close(mixed, by_torch(query, key, value, causal_mask(seq, 4), scale=0.2))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("seq", [1, 4])
def test_values_may_be_wider_than_keys(seq: int, kv_heads: int) -> None:
    query, key, value = inputs(4, kv_heads, seq, 4)
    value = torch.cat([value, value[..., :2].cos()], dim=-1)
    mixed, _ = attention(Layer(groups=4 // kv_heads), query, key, value, None)
    torch.testing.assert_close(mixed, by_torch(query, key, value, causal_mask(seq, 4)))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("seq", [1, 3])
def test_a_query_that_attends_to_nothing_is_finite(seq: int, kv_heads: int) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(4, kv_heads, seq, 5))
    mask = random_mask(BATCH, 1, seq, 5)
    mask[1] = False
    mixed, _ = attention(Layer(groups=4 // kv_heads), query, key, value, mask)
    gradients = torch.autograd.grad(mixed.square().sum(), (query, key, value))
    assert all(x.isfinite().all() for x in (mixed, *gradients))
    rows = torch.tensor([0, 2])
    expected = by_torch(query[rows], key[rows], value[rows], mask[rows])
    torch.testing.assert_close(mixed[rows], expected)


@pytest.mark.parametrize("seq", [1, 3])
def test_in_bf16_it_is_as_near_as_bf16_is(seq: int) -> None:
    exact = inputs(4, 2, seq, 6)
    mixed, _ = attention(Layer(groups=2), *(x.bfloat16() for x in exact), None)
    assert mixed.dtype == torch.bfloat16
    expected = by_torch(*(x.bfloat16().double() for x in exact), causal_mask(seq, 6))
    assert (mixed.double() - expected).abs().max() < 0.03


FALLS_BACK = {
    "many keys": ({"seq": 2, "keys": SHORT + 1}, {}),
    "dropout": ({"seq": 4, "keys": 4}, {"dropout": 0.5}),
    "a mask of numbers": ({"seq": 4, "keys": 4}, {"attention_mask": torch.eye(4)[None, None]}),
}


@pytest.mark.parametrize("reason", FALLS_BACK)
def test_everything_else_is_left_to_transformers(reason: str) -> None:
    lengths, options = FALLS_BACK[reason]
    tensors = inputs(4, 2, **lengths, dtype=torch.float32)
    options = {"attention_mask": None, "scaling": 0.3, **options}
    results = []
    for function in (attention, sdpa_attention_forward):
        torch.manual_seed(4)
        with Operations() as run:
            results.append(function(Layer(groups=2), *tensors, **options)[0])
        # Torch itself attends with dropout by other operations on a CPU.
        assert run.are_torchs_attention or reason == "dropout"
    assert torch.equal(*results)


def test_the_limit_is_of_keys() -> None:
    query, key, value = inputs(2, 2, 2, SHORT, dtype=torch.float32)
    with Operations() as run:
        mixed, _ = attention(Layer(), query, key, value, None)
    assert not run.are_torchs_attention
    expected = by_torch(query, key, value, causal_mask(2, SHORT))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


def shape(architecture: str) -> hf.PretrainedConfig:
    """Configurations as they come from the hub; Llama's heads share their keys."""
    common = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if architecture == "gpt2":
        return hf.GPT2Config(n_layer=2, n_embd=16, n_head=4, n_positions=32, **common)
    sizes = {
        "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24,
        "num_attention_heads": 4, "max_position_embeddings": 32,
    }  # fmt: skip
    if architecture == "gpt_neox":
        return hf.GPTNeoXConfig(**sizes, **common)
    config = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config}[architecture]
    return config(**sizes, num_key_value_heads=2, **common)


def model(architecture: str, **options: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    built = hf.AutoModelForCausalLM.from_config(shape(architecture), **options).eval()
    stretch(built, seed=0)
    return built


def logits(of: hf.PreTrainedModel) -> Tensor:
    positions = (MASK.long().cumsum(dim=1) - 1).clamp(min=0)
    return of(input_ids=TOKENS, attention_mask=MASK.long(), position_ids=positions).logits[MASK]


def test_a_model_computes_the_same_with_them(architecture: str) -> None:
    plain = model(architecture)
    quick = copy.deepcopy(plain)
    install_kernels(quick)
    assert plain.config._attn_implementation == "sdpa"
    assert quick.config._attn_implementation == ATTENTION
    with Operations() as before:
        expected = logits(plain)
    with Operations() as after:
        seen = logits(quick)
    assert before.are_torchs_attention
    assert not after.are_torchs_attention
    assert_near(seen, expected, tolerance=1e-6)
    for one in (plain, quick):
        logits(one).log_softmax(dim=-1)[..., 5].sum().backward()
    own = dict(quick.named_parameters())
    assert own.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert_near(own[name].grad, parameter.grad)
    # A token after others, from the cache.
    steps = []
    for one in (plain, quick):
        cache = one(input_ids=TOKENS[:1, :8], use_cache=True).past_key_values
        steps.append(one(input_ids=TOKENS[:1, 8:], past_key_values=cache).logits)
    assert_near(steps[1], steps[0], tolerance=1e-6)


def test_only_gpt2s_gelu_is_replaced(architecture: str) -> None:
    plain = model(architecture)
    quick = copy.deepcopy(plain)
    install_kernels(quick)
    replaced = [
        (type(old), new)
        for (_, old), (_, new) in zip(plain.named_modules(), quick.named_modules(), strict=True)
        if type(old) is not type(new)
    ]
    assert [kind for kind, _ in replaced] == (
        [NewGELUActivation] * 2 if architecture == "gpt2" else []
    )
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    for _, new in replaced:
        torch.testing.assert_close(new(x), NewGELUActivation()(x))
        assert (new(x) - gelu(x)).abs().max() > 1e-4  # it is not the exact GELU
    assert list(quick.state_dict()) == list(plain.state_dict())


def test_attention_that_was_chosen_is_kept() -> None:
    # That sdpa was chosen is known only where models are loaded; see test_pretrained.
    quick = model("llama", attn_implementation="eager")
    install_kernels(quick)
    assert quick.config._attn_implementation == "eager"


def test_nothing_of_them_is_saved(architecture: str, tmp_path: Path) -> None:
    quick = model(architecture)
    quick.save_pretrained(tmp_path / "before")
    expected = logits(quick)
    install_kernels(quick)
    quick.save_pretrained(tmp_path / "after")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        both = [(tmp_path / folder / name).read_bytes() for folder in ("before", "after")]
        assert both[0] == both[1]
    assert ATTENTION not in json.dumps(quick.config.to_dict())
    assert quick.config._attn_implementation == ATTENTION
    reloaded, info = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "after", output_loading_info=True
    )
    assert not any(info.values())
    assert reloaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(reloaded.eval()), expected)


def test_transformer_lens_shows_the_same(architecture: str) -> None:
    plain = model(architecture)
    expected = logits(plain)
    install_kernels(plain)
    policy = TransformerWithValueHead(plain, build_tokenizer())
    bridge = policy.hooked()
    assert_near(bridge(TOKENS, attention_mask=MASK.long(), return_type="logits")[MASK], expected)
    hooked = TransformerWithValueHead(plain, build_tokenizer(), engine="hooked")
    assert_near(hooked(TOKENS, MASK)[0][MASK], expected)
    assert plain.config._attn_implementation == ATTENTION


def test_a_policy_has_them(architecture: str) -> None:
    assert tiny_policy(architecture).language_model.config._attn_implementation == ATTENTION

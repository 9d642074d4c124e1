"""Adapters: where they sit, what they are saved as, and that others open it."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_exp.models.finetune import Lora
from rlhf_exp.models.loading import load_policy
from rlhf_exp.models.lora import adapter_off, add_adapter, has_adapter, merged_copy, merged_state
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import WithoutAdapter, reference_hash
from rlhf_exp.models.saving import save_policy
from rlhf_exp.settings import ConfigError
from tests.architectures import build
from tests.builders import (
    assert_near,
    build_tokenizer,
    plain_forward,
    ragged_tokens,
    stretch,
    tiny_policy,
)

TOKENS, MASK = ragged_tokens()


def adapted(architecture: str, **options: object) -> TransformerWithValueHead:
    """A policy whose adapters have a large effect, as after much training."""
    policy = tiny_policy(architecture)
    Lora(**{"rank": 4, "alpha": 6, **options}).attach(policy, seed=0)
    shake_adapters(policy)
    return policy


def shake_adapters(policy: TransformerWithValueHead) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapters(policy: TransformerWithValueHead) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_" in n}


LAYERS = {
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "llama": {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")},
    "qwen2": {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}


def test_every_linear_layer_but_the_unembedding_gets_an_adapter(architecture: str) -> None:
    policy = tiny_policy(architecture)
    before = torch.get_rng_state()
    Lora(rank=4).attach(policy, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapters(policy)} == LAYERS[
        architecture
    ]
    num_matrices = {"gpt2": 4, "gpt_neox": 4}.get(architecture, 7)
    assert len(adapters(policy)) == 2 * 2 * num_matrices
    assert all(4 in parameter.shape for parameter in adapters(policy).values())
    again, other = tiny_policy(architecture), tiny_policy(architecture)
    Lora(rank=4).attach(again, seed=0)
    Lora(rank=4).attach(other, seed=1)
    first, second, third = adapters(policy), adapters(again), adapters(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_layers_are_chosen_by_their_names() -> None:
    for target_modules in (["q_proj", "v_proj"], r".*\.(q|v)_proj"):
        policy = tiny_policy("llama")
        Lora(target_modules=target_modules).attach(policy, seed=0)
        assert {name.split(".")[-4] for name in adapters(policy)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("architecture", "target_modules", "message"),
    [
        ("gpt2", ["q_proj"], r"target_modules=\['q_proj'\]: Target modules .* not found"),
        ("llama", "nothing", "target_modules=nothing: Target modules nothing not found"),
        ("llama", ["norm"], r"target_modules=\['norm'\]: Target module LlamaRMSNorm.* not supp"),
        ("gpt2", ["c_attn", "lm_head"], "lm_head is an embedding; name linear layers between"),
        ("gpt2", ["wte"], r"transformer\.wte is an embedding"),
        ("llama", ["lm_head"], "lm_head is an embedding"),
        ("gpt_neox", ".*embed_in", r"gpt_neox\.embed_in is an embedding"),
    ],
)
def test_layers_that_cannot_be_adapted(
    architecture: str, target_modules: str | list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^finetune\..*{message}"):
        Lora(target_modules=target_modules).attach(tiny_policy(architecture), seed=0)


def test_adapters_add_what_their_two_matrices_make(architecture: str) -> None:
    policy = adapted(architecture)
    plain = tiny_policy(architecture)
    lora = adapters(policy)
    state = merged_state(policy.language_model)
    own = plain.language_model.state_dict()
    assert state.keys() == own.keys()
    for name, tensor in own.items():
        prefix = f"language_model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.default.weight" not in lora:
            assert torch.equal(state[name], tensor)
            continue
        down, up = (lora[f"{prefix}.lora_{x}.default.weight"] for x in "AB")
        delta = 6 / 4 * (up @ down)  # alpha / rank
        # GPT-2's matrices are transposed.
        expected = tensor + (delta.T if architecture == "gpt2" else delta)
        assert_near(state[name], expected, tolerance=1e-6)
        assert (expected - tensor).abs().max() > 0.1


def test_adapters_can_be_switched_off(architecture: str) -> None:
    policy = adapted(architecture)
    plain, with_them = tiny_policy(architecture)(TOKENS, MASK)[0], policy(TOKENS, MASK)[0]
    assert (with_them - plain)[MASK].abs().max() > 0.1
    with adapter_off(policy.language_model):
        assert_near(policy(TOKENS, MASK)[0][MASK], plain[MASK])
    assert torch.equal(policy(TOKENS, MASK)[0], with_them)
    with pytest.raises(RuntimeError), adapter_off(policy.language_model):
        raise RuntimeError
    assert torch.equal(policy(TOKENS, MASK)[0], with_them)


def test_a_merged_copy_computes_the_same_and_is_plain(architecture: str) -> None:
    policy = adapted(architecture)
    policy.language_model.name_or_path = "somewhere"
    plain = merged_copy(policy.language_model)
    assert type(plain) is type(policy.language_model)
    assert not has_adapter(plain)
    assert has_adapter(policy.language_model)
    assert not plain.training
    assert plain.name_or_path == "somewhere"
    theirs = TransformerWithValueHead(plain, policy.tokenizer)
    assert_near(theirs(TOKENS, MASK)[0][MASK], policy(TOKENS, MASK)[0][MASK])
    half = adapted(architecture)
    half.language_model.to(torch.bfloat16)
    assert {p.dtype for p in merged_copy(half.language_model).parameters()} == {torch.bfloat16}


def test_looking_inside_shows_the_merged_model(architecture: str) -> None:
    policy = adapted(architecture)
    logits = policy.hooked()(TOKENS, attention_mask=MASK.long(), return_type="logits")
    assert_near(logits[MASK], policy(TOKENS, MASK)[0][MASK])
    assert has_adapter(policy.language_model)


# transformers' own, which PEFT reads.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_save_holds_the_merged_model_and_the_adapters(architecture: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_policy(tiny_policy(architecture), base)
    policy = load_policy(base)
    Lora(rank=4, alpha=6).attach(policy, seed=0)
    shake_adapters(policy)
    logits, values, _ = plain_forward(policy, TOKENS, MASK)
    path = save_policy(policy, tmp_path / "run" / "model")
    assert torch.equal(policy(TOKENS, MASK)[0], logits)  # saving changed nothing

    saved, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    assert type(saved) is type(policy.language_model)
    theirs = TransformerWithValueHead(saved.eval(), policy.tokenizer)
    assert_near(theirs(TOKENS, MASK)[0][MASK], logits[MASK])
    assert (
        load_file(path / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    )
    ours = load_policy(tmp_path / "run")
    assert_near(ours(TOKENS, MASK)[0][MASK], logits[MASK])
    assert_near(ours(TOKENS, MASK)[1][MASK], values[MASK])
    for one, other in zip(
        ours.value_head.parameters(), policy.value_head.parameters(), strict=True
    ):
        assert torch.equal(one, other)

    plain = AutoModelForCausalLM.from_pretrained(base)
    reopened = peft.PeftModel.from_pretrained(plain, path / "adapter").eval()
    again = reopened(
        input_ids=TOKENS, attention_mask=MASK.long(),
        position_ids=(MASK.long().cumsum(dim=1) - 1).clamp(min=0),
    ).logits  # fmt: skip
    assert_near(again[MASK], logits[MASK])
    weights = load_file(path / "adapter" / "adapter_model.safetensors")
    theirs_by_name = peft.get_peft_model_state_dict(reopened)
    assert weights.keys() == theirs_by_name.keys()
    assert all(torch.equal(weights[name], theirs_by_name[name]) for name in weights)
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.0)
    assert (config["peft_type"], config["inference_mode"]) == ("LORA", True)
    assert config["task_type"] == "CAUSAL_LM"
    assert {n.rpartition(".")[2] for n in config["target_modules"]} == LAYERS[architecture]
    assert sorted(p.name for p in (path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


SHAPE = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}  # fmt: skip
MIXTURES = {
    "mixtral": hf.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3_moe": hf.Qwen3MoeConfig(**SHAPE, head_dim=8, moe_intermediate_size=8, num_experts=4),
    "olmoe": hf.OlmoeConfig(**SHAPE, num_experts=4),
    "deepseek_v3": hf.DeepseekV3Config(**SHAPE, **LATENT, n_group=2, topk_group=1),
    "deepseek_v2": hf.DeepseekV2Config(**SHAPE, **LATENT),
}


def mixture(name: str, path: Path) -> TransformerWithValueHead:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(MIXTURES[name])
    stretch(model, seed=0)
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return load_policy(path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_of_experts_are_merged_and_saved(name: str, tmp_path: Path) -> None:
    policy = mixture(name, tmp_path / "base")
    names = policy.language_model.state_dict().keys()
    before = policy(TOKENS, MASK)[0]
    frozen = reference_hash(policy.frozen_reference(), policy)
    Lora(rank=4, alpha=6).attach(policy, seed=0)
    shake_adapters(policy)
    assert any("experts" in adapter for adapter in adapters(policy))
    logits = policy(TOKENS, MASK)[0]
    assert (logits - before)[MASK].abs().max() > 0.1
    with adapter_off(policy.language_model):
        assert torch.equal(policy(TOKENS, MASK)[0], before)
    assert reference_hash(WithoutAdapter(policy), policy) == frozen
    assert merged_state(policy.language_model).keys() == names
    merged = TransformerWithValueHead(merged_copy(policy.language_model), policy.tokenizer)
    assert_near(merged(TOKENS, MASK)[0][MASK], logits[MASK])

    path = save_policy(policy, tmp_path / "run" / "model")
    loaded = load_policy(tmp_path / "run")
    assert_near(loaded(TOKENS, MASK)[0][MASK], logits[MASK])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    reopened = peft.PeftModel.from_pretrained(plain, path / "adapter").eval()
    assert_near(reopened(input_ids=TOKENS[:1]).logits, logits[:1])


def test_a_router_that_returns_more_than_logits_is_refused_by_name() -> None:
    model = hf.PhimoeForCausalLM(hf.PhimoeConfig(**SHAPE, num_local_experts=4))
    policy = TransformerWithValueHead(model, build_tokenizer())
    refused = r"target_modules=all-linear: model\.layers\.0\.mlp\.router is a PhimoeTopKRouter"
    with pytest.raises(ConfigError, match=refused):
        Lora().attach(policy, seed=0)


def test_a_matrix_that_the_model_multiplies_by_itself_gets_no_adapter() -> None:
    model = build("jamba")
    with pytest.raises(ValueError, match="other layers than dt_proj"):
        add_adapter(model, rank=2, alpha=4, target_modules="all-linear", seed=0)
    add_adapter(build("jamba"), rank=2, alpha=4, target_modules=["in_proj", "q_proj"], seed=0)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
def test_a_convolution_gets_no_adapter() -> None:
    config = hf.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"], block_multiple_of=8)
    policy = TransformerWithValueHead(hf.Lfm2ForCausalLM(config), build_tokenizer())
    with pytest.raises(ConfigError, match=r"layers\.0\.conv\.conv is a Conv1d, whose adapters"):
        Lora(target_modules=r".*\.conv\.conv").attach(policy, seed=0)


def test_adapters_are_fp32_on_a_base_of_any_type(architecture: str) -> None:
    policy = tiny_policy(architecture)
    policy.language_model.to(torch.bfloat16)
    add_adapter(policy.language_model, rank=4, alpha=8, target_modules="all-linear", seed=0)
    for name, parameter in policy.language_model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        assert parameter.requires_grad == ("lora_" in name)
    logits, values = policy(TOKENS, MASK)
    assert logits.dtype == torch.float32
    (logits.square().mean() + values.square().mean()).backward()
    moved = [p.grad.abs().max() for n, p in policy.named_parameters() if "lora_B" in n]
    assert min(moved) > 0

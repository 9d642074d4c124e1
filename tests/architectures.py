"""Tiny models with random weights of the architectures that people bring.

`python -m tests.architectures` prints the table of docs/models_and_data.md.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from rlhf_exp.functional.logprobs import token_logprobs
from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.models.fast_paths import find_fast_paths, supports_packing
from rlhf_exp.models.finetune import Lora
from rlhf_exp.models.loading import load_policy
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.saving import save_policy
from rlhf_exp.rollout.cached import CachedSampler, prefill
from rlhf_exp.rollout.measure import measure
from rlhf_exp.rollout.sampler import eos_token_id
from rlhf_exp.rollout.static import StaticDecoder
from rlhf_exp.settings import ConfigError
from rlhf_exp.types import Generation, Layout, PromptBatch
from tests.builders import WORDS, assert_near, build_tokenizer, prompts, stretch

COMMON: dict[str, Any] = {
    "vocab_size": 4 + len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {
    **COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MHA = {**LLAMA, "num_key_value_heads": 4}
OLD = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}  # no grouped heads
GPT2 = {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = {k: v for k, v in OLD.items() if k != "intermediate_size"}
HEADS = {"head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FINE_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **MHA, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4,
    "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4, "original_max_position_embeddings": 12,
}  # fmt: skip

# The prefix of transformers' classes, or the class of the model and that of its configuration, and
# the configuration.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", LLAMA),
    "bamba": ("Bamba", {**LLAMA, **MAMBA, "attn_layer_indices": [1]}),
    "bart": ("Bart", {**COMMON, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
                      "encoder_layers": 2, "encoder_attention_heads": 4, "decoder_ffn_dim": 64,
                      "encoder_ffn_dim": 64, "max_position_embeddings": 64, "is_decoder": True,
                      "is_encoder_decoder": False, "decoder_start_token_id": 2}),
    "bert": ("BertLMHeadModel BertConfig", {**OLD, "is_decoder": True}),
    "biogpt": ("BioGpt", OLD),
    "bitnet": ("BitNet", LLAMA),
    "bloom": ("Bloom", {**COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "codegen": ("CodeGen", {**GPT2, "rotary_dim": 4}),
    "cohere": ("Cohere", {**LLAMA, "logit_scale": 0.0625}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2,
                                   "moe_intermediate_size": 16, "first_k_dense_replace": 1,
                                   "n_group": 2, "topk_group": 1}),
    "diffllama": ("DiffLlama", MHA),
    "falcon": ("Falcon", FALCON),
    "falcon with alibi": ("Falcon", {**FALCON, "alibi": True, "multi_query": False,
                                     "parallel_attn": False}),
    "falcon, new": ("Falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon_h1": ("FalconH1", {**LLAMA, **MAMBA, "mamba_d_ssm": 64}),
    "gemma": ("Gemma", {**LLAMA, **HEADS}),
    "gemma2": ("Gemma2", {**LLAMA, **HEADS, "sliding_window": 4}),
    "gemma3": ("Gemma3ForCausalLM Gemma3TextConfig",
               {**LLAMA, **HEADS, "sliding_window": 4, "layer_types": MIXED}),
    "gemma3n": ("Gemma3nForCausalLM Gemma3nTextConfig",
                {**LLAMA, **HEADS, "intermediate_size": [48, 48], "sliding_window": 4,
                 "layer_types": MIXED, "vocab_size_per_layer_input": COMMON["vocab_size"],
                 "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 4,
                 "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]}),
    "glm": ("Glm", {**LLAMA, **HEADS}),
    "glm4": ("Glm4", {**LLAMA, **HEADS}),
    "gpt2": ("GPT2LMHeadModel GPT2Config", GPT2),
    "gpt2, unscaled": ("GPT2LMHeadModel GPT2Config", {**GPT2, "scale_attn_weights": False}),
    "gpt_bigcode": ("GPTBigCode", GPT2),
    "gpt_neo": ("GPTNeo", {**COMMON, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                           "attention_types": [[["global", "local"], 1]], "window_size": 4,
                           "intermediate_size": 64, "max_position_embeddings": 64}),
    "gpt_neox": ("GPTNeoX", OLD),
    "gpt_oss": ("GptOss", {**LLAMA, **HEADS, **EXPERTS, "sliding_window": 4, "layer_types": MIXED,
                           "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "gptj": ("GPTJ", {**GPT2, "rotary_dim": 4}),
    "granite": ("Granite", {**LLAMA, "logits_scaling": 8.0, "residual_multiplier": 0.5}),
    "granitemoe": ("GraniteMoe", {**LLAMA, **EXPERTS, "logits_scaling": 4.0}),
    "granitemoehybrid": ("GraniteMoeHybrid", {**LLAMA, **EXPERTS, **MAMBA,
                                              "shared_intermediate_size": 16,
                                              "layer_types": ["mamba", "attention"]}),
    "helium": ("Helium", {**LLAMA, **HEADS}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {**LLAMA, **HEADS}),
    "jamba": ("Jamba", {**LLAMA, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4,
                        "mamba_dt_rank": 4}),
    "lfm2": ("Lfm2", {**LLAMA, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "llama": ("Llama", LLAMA),
    "llama, eager": ("Llama", {**LLAMA, "attn_implementation": "eager"}),
    "llama, rope llama3": ("Llama", {**LLAMA, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    "llama, rope dynamic": ("Llama", {**LLAMA, "max_position_embeddings": 12, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama4": ("Llama4ForCausalLM Llama4TextConfig",
               {**LLAMA, **HEADS, "intermediate_size_mlp": 48, "num_local_experts": 2,
                "attention_chunk_size": 8, "no_rope_layers": [1, 0]}),
    "mamba": ("Mamba", {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "mamba2": ("Mamba2", {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
                          "num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "minicpm3": ("MiniCPM3", LATENT),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": None}),
    "mistral, sliding": ("Mistral", {**LLAMA, "sliding_window": 4}),
    "mixtral": ("Mixtral", {**LLAMA, **EXPERTS}),
    "mpt": ("Mpt", {**COMMON, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "nemotron": ("Nemotron", LLAMA),
    "olmo": ("Olmo", MHA),
    "olmo2": ("Olmo2", MHA),
    "olmo3": ("Olmo3", {**MHA, "sliding_window": 4, "layer_types": MIXED}),
    "olmoe": ("Olmoe", {**MHA, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPT", {**OLD, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt, 350m": ("OPT", {**OLD, "ffn_dim": 64, "word_embed_proj_dim": 16,
                          "do_layer_norm_before": False}),
    "persimmon": ("Persimmon", OLD),
    "phi": ("Phi", MHA),
    "phi3": ("Phi3", {**MHA, "sliding_window": None}),
    "phi3, longrope": ("Phi3", {**MHA, "sliding_window": None, "rope_parameters": LONGROPE,
                                "original_max_position_embeddings": 12}),
    "phimoe": ("Phimoe", {**LLAMA, **EXPERTS}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2, sliding": ("Qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 4,
                                 "max_window_layers": 1}),
    "qwen2_moe": ("Qwen2Moe", {**LLAMA, **FINE_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3", {**LLAMA, **HEADS}),
    "qwen3_moe": ("Qwen3Moe", {**LLAMA, **HEADS, **FINE_EXPERTS}),
    "qwen3_next": ("Qwen3Next", {**LLAMA, **HEADS, **FINE_EXPERTS,
                                 "shared_expert_intermediate_size": 16,
                                 "layer_types": ["linear_attention", "full_attention"],
                                 "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                                 "linear_num_key_heads": 2, "linear_num_value_heads": 4}),
    "recurrent_gemma": ("RecurrentGemma", {
        **{k: v for k, v in LLAMA.items() if k != "max_position_embeddings"}, "lru_width": 32,
        "attention_window_size": 4, "block_types": ["recurrent", "attention"]}),
    "rwkv": ("Rwkv", {**COMMON, "hidden_size": 32, "num_hidden_layers": 2,
                      "attention_hidden_size": 32, "context_length": 64}),
    "seed_oss": ("SeedOss", {**LLAMA, **HEADS}),
    "smollm3": ("SmolLM3", LLAMA),
    "stablelm": ("StableLm", MHA),
    "starcoder2": ("Starcoder2", {**LLAMA, "sliding_window": None}),
    "xglm": ("XGLM", {**COMMON, "d_model": 32, "num_layers": 2, "attention_heads": 4,
                      "ffn_dim": 64, "max_position_embeddings": 64}),
    "zamba2": ("Zamba2", {**MHA, "mamba_d_state": 4, "mamba_ngroups": 1, "n_mamba_heads": 8,
                          "mamba_headdim": 8, "num_mem_blocks": 1, "num_hidden_layers": 3,
                          "layer_types": ["mamba", "hybrid", "mamba"],
                          "hybrid_layer_ids": [1], "chunk_size": 8, "adapter_rank": 4}),
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    """The model, in evaluation mode, its weights away from their small initial ones."""
    classes, settings = ARCHITECTURES[name]
    model_class, _, config_class = classes.partition(" ")
    config = getattr(hf, config_class or f"{classes}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(hf, model_class if config_class else f"{classes}ForCausalLM")(config)
    stretch(model, seed=0, std=0.15)
    return model.eval()


def save(name: str, folder: Path) -> Path:
    """Writes the model and a tokenizer to the folder, as those who publish one do."""
    build(name).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


TEXTS = {
    "ragged": ["one two three four", "five", "six seven", "eight nine one two"],
    "shared": ["one two three four"] * 4,
}
SAMPLER = CachedSampler(gen_len=6, stop_at_eos=True)


def sample(policy: TransformerWithValueHead, batch: PromptBatch, *, static: bool) -> Generation:
    """Completions, some of which end early; by steps of fixed shapes if `static`."""
    generator = torch.Generator(policy.device).manual_seed(3)
    if not static:
        return SAMPLER(policy, batch, generator)
    rows, width = batch.tokens.shape
    eos = eos_token_id(policy, stop_at_eos=True)
    uniforms = torch.rand((rows, SAMPLER.gen_len), generator=generator, device=policy.device)
    decoder = StaticDecoder(policy, SAMPLER, rows, width)
    with torch.no_grad():
        seen = None if batch.mask.all() else batch.mask
        cache, hidden = prefill(policy, batch, seen, width + SAMPLER.gen_len)
        assert cache is not None
        return decoder.run(batch, cache, hidden, uniforms, eos=eos)


def largest_error(policy: TransformerWithValueHead, reference: Any, *, static: bool) -> float:
    """How far a phase's first numbers are from what they are by definition while the policy is its
    reference: the KL of 0, and log-probs of the pass that learns from those at sampling."""
    errors = []
    for texts in TEXTS.values():
        batch = prompts(policy, texts)
        generation = sample(policy, batch, static=static)
        scores = torch.zeros(len(texts), device=policy.device)
        rollout = measure(policy, reference, generation, scores, temperature=1.0)
        errors += [rollout.kl.abs().max(), (rollout.logprobs - rollout.ref_logprobs).abs().max()]
        errors.append((learning_logprobs(policy, generation) - generation.logprobs).abs().max())
    return max(error.item() for error in errors)


@torch.no_grad()
def learning_logprobs(policy: TransformerWithValueHead, generation: Generation) -> Tensor:
    """Log-probs of the completions by the pass that learns from them."""
    completions = generation.completions
    layout = Layout.of(completions)
    hidden = policy.completion_states(completions, layout)
    logits = policy.unembed(hidden)[:, : layout.num_columns]
    tokens = completions.tokens[:, : layout.num_columns]
    logprobs = token_logprobs(logits.float(), tokens) * completions.mask[:, : layout.num_columns]
    missing = completions.tokens.shape[1] - layout.num_columns
    return torch.nn.functional.pad(logprobs, (0, missing))


@dataclass(frozen=True)
class Row:
    """What an architecture can do here; `refused` is why not if it cannot at all."""

    name: str
    refused: str = ""
    cache: bool = False
    one_prompt: bool = False
    static: bool = False
    packs: bool = False
    lora: bool = False
    hooked: bool = False

    def __str__(self) -> str:
        if self.refused:
            return f"| {self.name} | refused: {self.refused} | | | | | |"
        marks = (self.one_prompt, self.static, self.packs, self.lora, self.hooked)
        runs = "yes" if self.cache else "yes, decoding without a cache"
        return f"| {self.name} | {runs} | {' | '.join('yes' if m else 'no' for m in marks)} |"


TABLE = """\
| architecture | runs | one prompt | CUDA graphs | packing | LoRA | hooked |
| --- | --- | --- | --- | --- | --- | --- |"""


def examine(name: str, folder: Path) -> Row:
    """The row of an architecture. Raises AssertionError if something that is allowed computes
    something else than it should: KL at equal weights, first ratio, saved models."""
    try:
        policy = load_policy(save(name, folder / "base"))
    except ConfigError as error:
        return Row(name, refused=str(error).splitlines()[0].removeprefix("model: "))
    paths = find_fast_paths(policy, static=True)
    reference = policy.frozen_reference()
    for static in (False, True)[: 1 + paths.static]:
        assert largest_error(policy, reference, static=static) < 1e-4
    assert_saved(policy, folder / "saved")
    row = Row(
        name, cache=paths.cache, one_prompt=paths.one_prompt, static=paths.static,
        packs=supports_packing(policy), hooked=is_hooked(folder / "base"),
    )  # fmt: skip
    try:
        without = Lora(rank=2).attach(policy, seed=0)
    except ConfigError:
        return row
    assert largest_error(policy, without, static=False) < 1e-4
    adapters = nn.ParameterList(p for p in policy.parameters() if p.requires_grad)
    stretch(adapters, seed=1, std=0.1)
    batch = prompts(policy, TEXTS["ragged"])
    generation = sample(policy, batch, static=False)
    assert_near(learning_logprobs(policy, generation), generation.logprobs, tolerance=1e-4)
    assert_saved(policy, folder / "lora")
    return replace(row, lora=True)


def is_hooked(folder: Path) -> bool:
    """Whether TransformerLens runs the model."""
    try:
        load_policy(folder, engine="hooked")
    except ConfigError:
        return False
    return True


@torch.no_grad()
def assert_saved(policy: TransformerWithValueHead, folder: Path) -> None:
    """A saved policy reloads with the same logits and values; merged adapters round."""
    tokens = torch.arange(4, 12)[None]
    again = load_policy(save_policy(policy, folder))
    for one, other in zip(again(tokens), policy(tokens), strict=True):
        assert_near(one, other, tolerance=1e-4)


def table() -> str:
    """The table of all architectures."""
    rows = []
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(str(examine(name, Path(folder))))
    return "\n".join([TABLE, *rows])


if __name__ == "__main__":
    print(table())

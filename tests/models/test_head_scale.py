"""Scales and soft caps measured on the models that have them, and the logits that come of them."""

import pytest
import torch
import transformers as hf

from rlhf_exp.models.head_scale import measure_unembedding
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.settings import ConfigError

from ..builders import assert_near, build_tokenizer, stretch, tiny_policy

SHAPE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 8,
    "kv_lora_rank": 8,
}  # fmt: skip
MODELS = [
    (hf.LlamaConfig(**SHAPE), 1.0, None),
    (hf.GraniteConfig(**SHAPE, logits_scaling=6.0), 1 / 6, None),
    (hf.HyperCLOVAXConfig(**SHAPE, logits_scaling=6.0), 6.0, None),
    (hf.CohereConfig(**SHAPE, logit_scale=0.0625), 0.0625, None),
    (hf.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=30.0), 1.0, 30.0),
    (hf.Gemma3TextConfig(**SHAPE, head_dim=8, final_logit_softcapping=2.0), 1.0, 2.0),
    # Scaled before the output embedding, in place of after it.
    (hf.MiniCPM3Config(**SHAPE, **LATENT, dim_model_base=8), 0.25, None),
]


def drawn(config: hf.PretrainedConfig, *, seed: int = 0) -> hf.PreTrainedModel:
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    stretch(model, seed=seed)
    return model


@pytest.mark.parametrize(
    ("config", "scale", "cap"), MODELS, ids=lambda x: getattr(x, "model_type", "")
)
def test_scale_and_cap_are_the_models_own(config, scale, cap):
    model = drawn(config)
    assert measure_unembedding(model) == (pytest.approx(scale, rel=1e-6), cap)
    transformer = CausalTransformer(model, build_tokenizer())
    tokens = torch.arange(4, 11)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        hidden = transformer.hidden_states(tokens, None)
    assert_near(transformer.unembed(hidden), expected, tolerance=1e-6)
    unscaled = model.get_output_embeddings()(hidden)
    assert torch.allclose(unscaled, expected, rtol=1e-3) == (scale == 1 and cap is None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_precision_of_the_weights_does_not_round_a_scale(dtype):
    model = drawn(hf.GraniteConfig(**SHAPE, logits_scaling=6.0)).to(dtype)
    assert measure_unembedding(model).scale == 1 / 6
    model = drawn(hf.MiniCPM3Config(**SHAPE, **LATENT, dim_model_base=5)).to(dtype)
    assert measure_unembedding(model).scale == pytest.approx(5 / 32, rel=1e-6)


def test_measuring_leaves_the_model_as_it_was(architecture):
    policy = tiny_policy(architecture)
    tokens = torch.arange(4, 11)[None]
    before = policy.language_model(input_ids=tokens).logits
    measure_unembedding(policy.language_model)
    assert torch.equal(policy.language_model(input_ids=tokens).logits, before)


@pytest.mark.parametrize("change", ["relu", "bias", "slice", "norm before"])
def test_an_unembedding_of_more_than_a_scale_and_a_cap_is_refused(change):
    model = drawn(hf.LlamaConfig(**SHAPE))
    changes = {
        "relu": torch.relu,
        "bias": lambda logits: logits + torch.arange(16),
        "slice": lambda logits: logits[..., :12],
    }

    def after(module, args, output):
        output.logits = changes[change](output.logits)

    def before(module, args):
        return torch.nn.functional.normalize(args[0], dim=-1)

    if change in changes:
        model.register_forward_hook(after)
    else:
        model.get_output_embeddings().register_forward_pre_hook(before)
    with pytest.raises(ConfigError, match="LlamaForCausalLM does more than its output embedding"):
        CausalTransformer(model, build_tokenizer())


def test_a_model_that_is_its_own_base_is_refused():
    config = hf.Llama4TextConfig(**SHAPE, head_dim=8, intermediate_size_mlp=32, num_local_experts=2)
    model = hf.Llama4ForCausalLM(config)
    with pytest.raises(ConfigError, match="Llama4ForCausalLM has no base model or no output"):
        measure_unembedding(model)

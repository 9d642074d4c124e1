import json

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from rlhf_exp.models.saving import save_policy
from tests.builders import assert_near, plain_forward, ragged_tokens, tiny_policy, with_engine

TOKENS, MASK = ragged_tokens()


def test_other_tools_open_what_is_saved(architecture, tmp_path):
    policy = tiny_policy(architecture)
    assert save_policy(policy, str(tmp_path / "new" / "model")) == tmp_path / "new" / "model"
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "new" / "model", local_files_only=True, output_loading_info=True
    )
    assert not any(info.values())
    assert type(model) is type(policy.language_model)
    logits, _, _ = plain_forward(policy, TOKENS, MASK)
    ours = model.eval()(
        input_ids=TOKENS, attention_mask=MASK.long(),
        position_ids=(MASK.long().cumsum(dim=1) - 1).clamp(min=0),
    ).logits  # fmt: skip
    # By torch's own attention and GELU, which a policy has replaced.
    assert model.config._attn_implementation == "sdpa"
    assert_near(ours[MASK], logits[MASK], tolerance=1e-6)

    # AutoTokenizer takes any tokenizer beside a Qwen2 for Qwen's own.
    tokenizers = PreTrainedTokenizerFast if architecture == "qwen2" else AutoTokenizer
    tokenizer = tokenizers.from_pretrained(tmp_path / "new" / "model")
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert tokenizer("nine . one")["input_ids"] == [13, 14, 5]
    assert tokenizer.decode([13, 14, 5]) == "nine . one"
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (0, 1, 2)
    generation = GenerationConfig.from_pretrained(tmp_path / "new" / "model")
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


def test_the_files_are_safetensors_and_json(architecture, tmp_path):
    save_policy(tiny_policy(architecture), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "value_head.safetensors",
    ]
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())


def test_the_value_head_is_beside_the_model(tmp_path):
    policy = tiny_policy()
    save_policy(policy, tmp_path)
    head = load_file(tmp_path / "value_head.safetensors")
    assert head.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, tensor in policy.value_head.state_dict().items():
        assert torch.equal(head[name], tensor)
    assert not any("value_head" in name for name in load_file(tmp_path / "model.safetensors"))


def test_either_engine_saves_the_same_files(architecture, tmp_path):
    policy = tiny_policy(architecture)
    hooked = with_engine(policy, "hooked")
    hooked(TOKENS, MASK)  # TransformerLens has been over the model
    for name, saved in (("fast", policy), ("hooked", hooked)):
        save_policy(saved, tmp_path / name)
    for path in (tmp_path / "fast").iterdir():
        assert path.read_bytes() == (tmp_path / "hooked" / path.name).read_bytes(), path.name


def test_saving_again_replaces_what_was_there(tmp_path):
    policy = tiny_policy()
    save_policy(policy, tmp_path)
    with torch.no_grad():
        policy.value_head[2].bias.add_(1)
    save_policy(policy, tmp_path)
    bias = load_file(tmp_path / "value_head.safetensors")["2.bias"]
    assert torch.equal(bias, policy.value_head[2].bias)

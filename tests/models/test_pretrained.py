"""What can be asked of a model that exists: its attention, its weights' type, its own code."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from pydantic import ValidationError

from rlhf_exp.kernels.attention import ATTENTION
from rlhf_exp.models.loading import (
    Pretrained,
    build_policy,
    load_language_model,
    load_policy,
    load_tokenizer,
)
from rlhf_exp.models.lora import add_adapter, save_adapter
from rlhf_exp.models.model_checks import must_be_fp32, must_be_plain
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.saving import save_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.settings import ConfigError
from tests.builders import assert_near, build_tokenizer, plain_forward, ragged_tokens, tiny_policy

TOKENS, MASK = ragged_tokens()
CPU = torch.device("cpu")


def build(path: Path, **options: object) -> TransformerWithValueHead:
    return build_policy(Pretrained(base_model=str(path), **options), None, device=CPU, seed=0)


def test_all_attentions_compute_the_same(architecture: str, tmp_path: Path) -> None:
    policy = tiny_policy(architecture)
    save_policy(policy, tmp_path)
    for asked in ("eager", "sdpa", None):
        loaded = build(tmp_path, attn_implementation=asked)
        used = loaded.language_model.config._attn_implementation
        assert used == (asked or ATTENTION)
        with torch.no_grad():
            for ours, expected in zip(loaded(TOKENS, MASK), policy(TOKENS, MASK), strict=True):
                assert_near(ours[MASK], expected[MASK])


def test_attention_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="'eager', 'sdpa' or 'flash_attention_2'"):
        Pretrained(base_model="gpt2", attn_implementation="fast")
    save_policy(tiny_policy(), tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.base_model=.* cannot be loaded[\s\S]*[Ff]lash"):
        build(tmp_path, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("asked", ["sdpa", "flash_attention_2"])
def test_transformer_lens_brings_its_own_attention(asked: str) -> None:
    message = f"attn_implementation={asked}: TransformerLens computes .* or engine=fast"
    with pytest.raises(ValidationError, match=message):
        Pretrained(base_model="gpt2", engine="hooked", attn_implementation=asked)
    for fine in (None, "eager"):
        Pretrained(base_model="gpt2", engine="hooked", attn_implementation=fine)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_weights_are_of_the_type_that_is_asked_for(
    architecture: str, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    policy = tiny_policy(architecture)
    save_policy(policy, tmp_path)
    loaded = build(tmp_path, dtype=name)
    assert {p.dtype for p in loaded.language_model.parameters()} == {dtype}
    # The value head stays in fp32 whatever the model is in.
    for ours, saved in zip(
        loaded.value_head.parameters(), policy.value_head.parameters(), strict=True
    ):
        assert torch.equal(ours, saved)
    with torch.no_grad():
        logits, values = loaded(TOKENS, MASK)
        exact, _, hidden = plain_forward(policy, TOKENS, MASK)
    assert logits.dtype == values.dtype == torch.float32
    scale = exact.abs().max()
    # A bfloat16 has three digits, of which two layers leave two.
    assert (logits - exact)[MASK].abs().max() < 0.05 * scale
    assert (values - policy.values(hidden))[MASK].abs().max() < 0.1


OWN = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
Path({mark!r}).touch()
class OwnConfig(GPT2Config):
    model_type = "own"
class Own(GPT2LMHeadModel):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    policy, path, ran = tiny_policy(), tmp_path / "model", tmp_path / "ran"
    save_policy(policy, path)
    (path / "own_code.py").write_text(OWN.format(mark=str(ran)))
    code = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.Own"}
    for name, own in (
        ("config.json", {"model_type": "own", "auto_map": code}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}}),
    ):
        file = path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
    fix = r"it comes with code; if you trust that, set model\.trust_remote_code=true\.\n"
    for load in (build, load_policy, lambda p: load_language_model(str(p))):
        with pytest.raises(ConfigError, match=fix):
            load(path)
    assert not ran.exists()
    trusted = build(path, trust_remote_code=True)
    assert ran.exists()
    assert type(trusted.language_model).__name__ == "Own"
    assert type(trusted.tokenizer).__name__ == "OwnTokenizer"
    assert trusted.tokenizer("nine . one")["input_ids"] == [13, 14, 5]
    assert torch.equal(trusted(TOKENS, MASK)[0], policy(TOKENS, MASK)[0])


def test_an_adapter_must_be_merged_first(tmp_path: Path) -> None:
    policy = tiny_policy("llama")
    save_policy(policy, tmp_path)
    add_adapter(policy.language_model, rank=2, alpha=4, target_modules="all-linear", seed=0)
    save_adapter(policy.language_model, tmp_path)  # transformers would put it in by itself
    with pytest.raises(ConfigError, match=r"model\.base_model=.* holds an adapter: merge it"):
        load_policy(tmp_path)


@pytest.mark.parametrize("declared", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_a_tokenizer_is_what_its_file_says_beside_any_model(
    architecture: str, declared: str, tmp_path: Path
) -> None:
    policy = tiny_policy(architecture)
    save_policy(policy, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": declared}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("nine . one")["input_ids"] == [13, 14, 5]
    assert tokenizer.decode([13, 14, 5]) == "nine . one"
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_of_a_class_of_its_own_is_of_that_class(tmp_path: Path) -> None:
    save_policy(tiny_policy("qwen2"), tmp_path)
    letters = {"<|endoftext|>": 0, "a": 1, "b": 2, "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}": 3}
    hf.Qwen2Tokenizer(vocab=letters, merges=[]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert type(tokenizer) is hf.Qwen2Tokenizer
    assert tokenizer("ab a")["input_ids"] == [1, 2, 3, 1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_is_trained_must_be_fp32(dtype: str) -> None:
    [problem] = must_be_fp32(Pretrained(base_model="gpt2", dtype=dtype))
    assert problem.startswith(f"model.dtype={dtype}: weights that are trained must be fp32")
    assert must_be_fp32(Pretrained(base_model="gpt2")) == []
    assert must_be_fp32(Scratch()) == []
    both = must_be_plain(Pretrained(base_model="gpt2", dtype=dtype, engine="hooked"), stage="sft")
    assert both == [
        problem,
        "model.engine=hooked is for stage=ppo; stage=sft trains with engine=fast",
    ]
    assert must_be_plain(Pretrained(base_model="gpt2"), stage="sft") == []


def test_a_model_without_a_length_of_context_is_refused(tmp_path: Path) -> None:
    config = hf.BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2)
    hf.BloomForCausalLM(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="BloomForCausalLM does not say how many tokens"):
        load_policy(tmp_path)

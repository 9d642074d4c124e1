"""What is tried on a model when it is loaded, and what follows from it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from rlhf_exp.models.fast_paths import find_fast_paths, supports_packing, with_fast_paths
from rlhf_exp.models.loading import Pretrained, load_language_model, load_policy
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.transformer import FastPaths
from rlhf_exp.rl.setup import fitting_prompts, load_sampled_policy
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.prefix import Prefix
from rlhf_exp.types import Layout
from tests.architectures import TEXTS, build, largest_error, learning_logprobs, sample, save
from tests.builders import assert_near, build_tokenizer, prompts, stretch, tiny_policy
from tests.rl.toy import context


def wrapped(name: str) -> TransformerWithValueHead:
    return TransformerWithValueHead(build(name), build_tokenizer())


def test_all_is_right_on_the_families_of_the_tests(architecture: str) -> None:
    policy = tiny_policy(architecture)
    assert find_fast_paths(policy, static=True) == FastPaths()
    assert find_fast_paths(policy) == FastPaths(static=False)  # not on a CPU
    assert supports_packing(policy)


@pytest.mark.parametrize("context_len", [2, 3, 7])
def test_a_short_context_is_enough(context_len: int) -> None:
    config = hf.GPT2Config(
        vocab_size=16, n_positions=context_len, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    policy = TransformerWithValueHead(hf.GPT2LMHeadModel(config).eval(), build_tokenizer())
    assert find_fast_paths(policy, static=True) == FastPaths()
    assert supports_packing(policy)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rwkv", "RwkvForCausalLM is not supported: padding on the left"),
        ("bart", "BartForCausalLM is not supported: padding on the left"),
        ("gemma3n", "Gemma3nForCausalLM is not supported: its final hidden states"),
        ("mamba", "MambaForCausalLM does not say how many tokens"),
    ],
)
def test_what_is_wrong_without_any_fast_path_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        with_fast_paths(wrapped(name))


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    model = build("llama")
    config = model.config
    config.is_causal = False
    ahead = hf.LlamaForCausalLM(config).eval()
    ahead.load_state_dict(model.state_dict())
    with pytest.raises(ConfigError, match="what it computes at a token depends on later ones"):
        with_fast_paths(TransformerWithValueHead(ahead, build_tokenizer()))


def test_one_that_loses_its_place_decodes_without_a_cache(caplog: pytest.LogCaptureFixture) -> None:
    policy = with_fast_paths(wrapped("bamba"))
    assert policy.fast_paths == FastPaths(cache=False, one_prompt=False, static=False)
    assert "sampling does not use one and is slower" in caplog.text
    assert largest_error(policy, policy.frozen_reference(), static=False) < 1e-4
    policy.fast_paths = FastPaths(static=False)
    assert largest_error(policy, policy.frozen_reference(), static=False) > 0.01


def test_a_cache_that_depends_on_the_weights_is_not_used() -> None:
    policy = wrapped("zamba2")
    assert not find_fast_paths(policy).cache
    stretch(policy.language_model, seed=1)  # as training may
    assert largest_error(policy, policy.frozen_reference(), static=False) > 0.01
    policy.fast_paths = find_fast_paths(policy)
    assert largest_error(policy, policy.frozen_reference(), static=False) < 1e-4


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("name", ["jamba", "lfm2", "qwen3_next", "granitemoehybrid", "falcon_h1"])
def test_states_of_other_kinds_are_shared_and_left(name: str, texts: str) -> None:
    policy = with_fast_paths(wrapped(name))
    assert policy.fast_paths.cache
    assert policy.fast_paths.one_prompt
    generation = sample(policy, prompts(policy, TEXTS[texts]), static=False)
    ends = generation.completions.mask.sum(dim=1)
    assert len(set(ends.tolist())) > 1  # some rows left before others
    assert_near(learning_logprobs(policy, generation), generation.logprobs, tolerance=1e-4)


@pytest.mark.parametrize("settings", [{}, {"top_k": 4, "temperature": 0.7}, {"stop_at_eos": True}])
@pytest.mark.parametrize("texts", TEXTS)
def test_without_fast_paths_the_same_is_sampled(
    architecture: str, texts: str, settings: dict[str, object]
) -> None:
    policy = tiny_policy(architecture)
    batch, sampler = prompts(policy, TEXTS[texts]), CachedSampler(gen_len=9, **settings)
    fast = sampler(policy, batch, torch.Generator().manual_seed(3))
    policy.fast_paths = FastPaths(cache=False, one_prompt=False, static=False)
    slow = sampler(policy, batch, torch.Generator().manual_seed(3))
    assert torch.equal(slow.completions.tokens, fast.completions.tokens)
    assert torch.equal(slow.completions.mask, fast.completions.mask)
    for name in ("logprobs", "values", "hidden", "kept_mass"):
        assert_near(getattr(slow, name), getattr(fast, name))
    layout = Layout.of(fast.completions)
    states = policy.completion_states(fast.completions, layout)
    policy.fast_paths = replace(policy.fast_paths, one_prompt=True)
    assert_near(states, policy.completion_states(fast.completions, layout))


def test_references_take_the_policys_fast_paths() -> None:
    policy = tiny_policy()
    policy.fast_paths = FastPaths(one_prompt=False)
    assert policy.frozen_reference().fast_paths == FastPaths(one_prompt=False)


class TestLongrope:
    """phi3 with longrope embeds all positions otherwise in sequences of more than 12 tokens."""

    def logits(self, policy: TransformerWithValueHead, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return policy.language_model(input_ids=tokens).logits

    def test_the_context_ends_at_the_switch(self) -> None:
        policy = wrapped("phi3, longrope")
        assert policy.context_len == 12
        tokens = torch.arange(4, 17)[None] % 16
        whole = self.logits(policy, tokens)
        assert (self.logits(policy, tokens[:, :12]) - whole[:, :12]).abs().max() > 0.1

    def test_prompts_are_told_why(self) -> None:
        policy, task = wrapped("phi3, longrope"), Prefix(prefix="one two three four")
        with pytest.raises(ConfigError, match=r"context of 12 .*embeddings of 64"):
            fitting_prompts(policy, task, task.train_prompts(), CachedSampler(gen_len=12))

    @pytest.mark.parametrize("name", ["llama, rope llama3", "phi3"])
    def test_others_have_all_of_theirs(self, name: str) -> None:
        assert wrapped(name).context_len == 64


@pytest.mark.parametrize(
    "name", ["opt", "gpt_oss", "falcon", "jamba", "lfm2", "qwen3_next", "biogpt", "xglm"]
)
def test_packing_leaks_on(name: str) -> None:
    assert not supports_packing(wrapped(name))


@pytest.mark.parametrize("name", ["llama, eager", "gptj", "codegen", "xglm"])
def test_fixed_shapes_hide_unwritten_slots_from_attention_that_adds_masks(name: str) -> None:
    policy = wrapped(name)
    assert policy.language_model.config._attn_implementation == "eager"
    assert largest_error(policy, policy.frozen_reference(), static=True) < 1e-4


@pytest.mark.parametrize("name", ["gpt_neo", "falcon with alibi", "mistral, sliding"])
def test_fixed_shapes_are_not_used_where_they_are_wrong(name: str) -> None:
    paths = find_fast_paths(wrapped(name), static=True)
    assert paths == FastPaths(static=False)


def test_the_hooked_engine_is_tried_at_load(tmp_path: Path) -> None:
    save("gpt2, unscaled", tmp_path)
    with pytest.raises(
        ConfigError, match="TransformerLens and transformers compute different logits"
    ):
        load_policy(tmp_path, engine="hooked")
    policy = load_policy(tmp_path)
    with pytest.raises(ConfigError, match="for this GPT2LMHeadModel"):
        policy.hooked()


@pytest.mark.parametrize("name", ["helium", "diffllama", "falcon, new"])
def test_what_transformer_lens_does_not_know_is_named(name: str, tmp_path: Path) -> None:
    policy = wrapped(name)
    kind = type(policy.language_model).__name__
    with pytest.raises(ConfigError, match=f"TransformerLens cannot open {kind}: "):
        policy.hooked()
    save(name, tmp_path)
    with pytest.raises(ConfigError, match=f"TransformerLens cannot open {kind}: "):
        load_policy(tmp_path, engine="hooked")


def test_so_it_is_for_the_sampler_that_uses_transformer_lens(tmp_path: Path) -> None:
    model = Pretrained(base_model=str(save("opt, 350m", tmp_path / "opt")))
    with pytest.raises(ConfigError, match="and sampler=cached"):
        load_sampled_policy(context(tmp_path), Prefix(prefix="one"), model, BridgeSampler())


def test_one_without_a_hook_for_values_is_refused(tmp_path: Path) -> None:
    save("opt, 350m", tmp_path)
    load_policy(tmp_path).hooked()
    with pytest.raises(ConfigError, match="different logits for OPTForCausalLM: use model"):
        load_policy(tmp_path, engine="hooked")


class TestMultimodal:
    def saved(self, path: Path) -> Path:
        text = {
            **{"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"max_position_embeddings": 64, "sliding_window": 4},
        }
        vision = {
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        }
        config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
        torch.manual_seed(0)
        hf.Gemma3ForConditionalGeneration(config).save_pretrained(path)
        build_tokenizer().save_pretrained(path)
        return path

    def test_its_text_part_is_loaded(self, tmp_path: Path) -> None:
        self.saved(tmp_path)
        whole = hf.Gemma3ForConditionalGeneration.from_pretrained(tmp_path).eval()
        model, _ = load_language_model(str(tmp_path))
        assert type(model) is hf.Gemma3ForCausalLM
        tokens = torch.arange(4, 14)[None]
        with torch.no_grad():
            assert_near(model(input_ids=tokens).logits, whole(input_ids=tokens).logits)
        policy = load_policy(tmp_path)
        assert largest_error(policy, policy.frozen_reference(), static=False) < 1e-4

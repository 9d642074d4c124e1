"""Decoding by steps of fixed shapes gives what the loop gives."""

import pytest
import torch

from rlhf_exp.models.loading import build_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rollout.cached import CachedSampler, prefill
from rlhf_exp.rollout.sampler import eos_token_id
from rlhf_exp.rollout.static import StaticDecoder
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.tasks.tokenizers import word_tokenizer

CPU = torch.device("cpu")
WORDS = [f"w{i}" for i in range(8)]
PROMPTS = {"shared": ["w1 w2 w3"] * 5, "ragged": ["w1 w2 w3", "w4", "w5 w6", "w7 w1 w2 w3", "w2"]}


@pytest.mark.parametrize("settings", [{}, {"top_k": 4, "temperature": 0.7}, {"stop_at_eos": True}])
@pytest.mark.parametrize("texts", PROMPTS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "gpt_neox"])
def test_static_steps_give_what_the_loop_gives(
    architecture: str, texts: str, settings: dict[str, object]
) -> None:
    model = Scratch(architecture=architecture, num_layers=2, d_model=32, num_heads=4)
    policy = build_policy(model, lambda: word_tokenizer(WORDS), device=CPU, seed=0)
    prompts = encode_prompts(policy.tokenizer, PROMPTS[texts], prepend_bos=False, device=CPU)
    sampler = CachedSampler(gen_len=20, **settings)
    expected = sampler(policy, prompts, torch.Generator().manual_seed(3))
    uniforms = torch.rand((5, 20), generator=torch.Generator().manual_seed(3))
    width = prompts.tokens.shape[1]
    decoder = StaticDecoder(policy, sampler, 5, width)
    seen = None if prompts.mask.all() else prompts.mask
    eos = eos_token_id(policy, stop_at_eos=sampler.stop_at_eos)
    for again in (uniforms.flip(0), uniforms):  # the second call must not see the first's
        with torch.no_grad():
            cache, hidden = prefill(policy, prompts, seen, width + 20)
            found = decoder.run(prompts, cache, hidden, again, eos=eos)
    completions = expected.completions
    assert torch.equal(found.completions.tokens, completions.tokens)
    assert torch.equal(found.completions.mask, completions.mask)
    assert completions.mask.all() != sampler.stop_at_eos
    for name in ("logprobs", "values", "hidden", "kept_mass"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=0)

"""The same promises on a CUDA device: `pytest -m gpu`. The default run leaves these out."""

from pathlib import Path

import pytest
import torch

from rlhf_exp.functional.logprobs import completion_logits, token_logprobs
from rlhf_exp.models.loading import build_policy, load_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.training.context import Context
from rlhf_exp.training.folder import RunFolder
from rlhf_exp.training.seeding import stream
from tests.stages.toy import RAGGED, ToyTask, parts

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_engines_are_equal(architecture: str) -> None:
    model = Scratch(architecture=architecture, d_model=32, num_heads=4, context_len=16)
    policy = build_policy(model, ToyTask().build_tokenizer, device=DEVICE, seed=0)
    tokens = torch.randint(16, (3, 8), device=DEVICE)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :3] = False
    fast = policy(tokens, mask)
    policy.engine = "hooked"
    for a, b in zip(fast, policy(tokens, mask), strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", [CachedSampler(gen_len=6), BridgeSampler(gen_len=6)])
def test_first_ratio_is_one(sampler: Sampler) -> None:
    model = Scratch(d_model=32, num_heads=4, context_len=16)
    policy = build_policy(model, ToyTask().build_tokenizer, device=DEVICE, seed=0)
    prompts = encode_prompts(policy.tokenizer, RAGGED.prompts, prepend_bos=True, device=DEVICE)
    generation = sampler(policy, prompts, stream(1, "samples", DEVICE))
    completions = generation.completions
    with torch.no_grad():
        logits, _ = policy(*completions.sequences)
    logprobs = token_logprobs(completion_logits(logits, completions.prompt_len), completions.tokens)
    assert ((logprobs - generation.logprobs).exp() - 1).abs().max() < 1e-4


def test_bandit_is_solved_and_its_policy_reloads(tmp_path: Path) -> None:
    ppo = PPO(total_phases=25, kl_coef=0.0, eval_every=25)
    context = Context(folder=RunFolder(tmp_path), seed=1, device=DEVICE)
    after = ppo.run(context, **parts(sampler=CachedSampler(gen_len=1)))["after"]
    assert after["eval/score"] > 0.9
    assert load_policy(tmp_path, device=DEVICE).device.type == DEVICE.type

"""A policy whose weights have diverged stops the run, whichever sampler meets it."""

import math

import pytest
import torch

from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.sampler import check_finite
from rlhf_exp.runs.context import TrainingError
from tests.builders import prompts, tiny_policy
from tests.rollout.oracles import RAGGED, SHARED

MESSAGE = (
    r"^the policy's logits are not finite: its weights have diverged; lower optimizer\.base_lr or"
    r" stage\.max_grad_norm, or raise stage\.kl_coef$"
)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_enough(wrong):
    numbers = torch.zeros(3, 4)
    check_finite(numbers)
    check_finite(numbers[:0])
    numbers[2, 1] = wrong
    check_finite(numbers[:2])
    with pytest.raises(TrainingError, match=MESSAGE):
        check_finite(numbers)


@pytest.mark.parametrize("cls", [CachedSampler, BridgeSampler])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("texts", [SHARED, RAGGED], ids=["shared", "ragged"])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9, "stop_at_eos": True}])
def test_a_diverged_policy_is_not_sampled_from(cls, wrong, texts, options):
    policy = tiny_policy()
    with torch.no_grad():
        policy.language_model.transformer.ln_f.bias[3] = wrong
    sampler = cls(gen_len=3, **options)
    with pytest.raises(TrainingError, match=MESSAGE):
        sampler(policy, prompts(policy, texts), torch.Generator().manual_seed(0))

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.rollout.bridge import BridgeSampler
from tests.builders import prompts, tiny_policy
from tests.rollout.oracles import RAGGED, assert_measured


def test_two_filters_at_once_are_refused():
    with pytest.raises(ValidationError, match=r"top_k=5 and top_p=0\.9: .* sampler=cached"):
        BridgeSampler(top_k=5, top_p=0.9)
    assert BridgeSampler(top_k=5).top_k == 5
    assert BridgeSampler(top_p=0.9).top_p == 0.9


def test_it_samples_from_the_weights_of_the_moment(architecture):
    policy = tiny_policy(architecture)
    sampler = BridgeSampler(gen_len=8, top_k=1)
    generator = torch.Generator().manual_seed(0)
    before = sampler(policy, prompts(policy, RAGGED), generator)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(-0.7)
    after = sampler(policy, prompts(policy, RAGGED), generator)
    assert not torch.equal(after.completions.tokens, before.completions.tokens)
    assert_measured(after, policy)
    # Greedy: each token is the most probable one of a full pass.
    tokens, mask = after.completions.sequences
    logits = policy(tokens, mask)[0][:, after.completions.prompt_len - 1 : -1]
    assert torch.equal(logits.argmax(dim=-1), after.completions.tokens)

import copy
import math

import pytest
import torch

from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.measure import measure
from rlhf_exp.types import Generation, Rollout
from tests.builders import assert_near, plain_forward, prompts, stretch, tiny_policy
from tests.rollout.oracles import RAGGED

TEXTS = RAGGED * 4


def generation_of(policy: TransformerWithValueHead) -> Generation:
    # So hot that some rows end early.
    sampler = CachedSampler(gen_len=9, stop_at_eos=True, temperature=3.0)
    return sampler(policy, prompts(policy, TEXTS), torch.Generator().manual_seed(0))


def moved(policy: TransformerWithValueHead) -> CausalTransformer:
    """A reference that the policy is some way from."""
    other = copy.deepcopy(policy)
    stretch(other.language_model, seed=7)
    return other.frozen_reference()


def rolled_out(policy, reference, *, temperature: float = 1.0) -> tuple[Generation, Rollout]:
    generation = generation_of(policy)
    scores = torch.arange(float(len(TEXTS)))
    return generation, measure(policy, reference, generation, scores, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_kl_entropy_and_log_probs_are_those_of_the_full_distributions(architecture, temperature):
    policy = tiny_policy(architecture)
    reference = moved(policy)
    generation, rollout = rolled_out(policy, reference, temperature=temperature)
    completions = generation.completions
    beside = TransformerWithValueHead(reference.language_model, policy.tokenizer)
    with torch.no_grad():
        logits, _, _ = plain_forward(policy, *completions.sequences)
        ref_logits, _, ref_hidden = plain_forward(beside, *completions.sequences)
    start = completions.prompt_len - 1
    assert 0 < completions.mask.sum() < completions.mask.numel()
    for row, column in completions.mask.nonzero().tolist():
        p, q = (
            (x[row, start + column].double() / temperature).log_softmax(dim=-1).tolist()
            for x in (logits, ref_logits)
        )
        kl = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        entropy = -math.fsum(math.exp(a) * a for a in p)
        ref_logprob = q[completions.tokens[row, column]]
        assert rollout.kl[row, column].item() == pytest.approx(kl, abs=1e-5, rel=1e-5)
        assert rollout.entropy[row, column].item() == pytest.approx(entropy, abs=1e-5)
        assert rollout.ref_logprobs[row, column].item() == pytest.approx(ref_logprob, abs=1e-5)
    assert rollout.kl.max() > 0.5
    mask = completions.mask
    assert_near(rollout.ref_hidden[mask], ref_hidden[:, start:-1][mask])


def test_the_policy_is_at_no_distance_from_itself(architecture):
    policy = tiny_policy(architecture)
    generation, rollout = rolled_out(policy, policy.frozen_reference(), temperature=3.0)
    assert rollout.kl.abs().max() < 1e-6
    assert_near(rollout.ref_logprobs, generation.logprobs)
    assert_near(rollout.ref_hidden, generation.hidden)


def test_padding_holds_zero():
    policy = tiny_policy()
    _, rollout = rolled_out(policy, moved(policy))
    padding = ~rollout.completions.mask
    assert padding.any()
    for name in (
        "logprobs", "ref_logprobs", "ref_hidden", "values", "kl", "entropy", "kept_mass",
    ):  # fmt: skip
        assert not getattr(rollout, name)[padding].any(), name


def test_what_the_sampler_measured_is_passed_on():
    policy = tiny_policy()
    generation, rollout = rolled_out(policy, moved(policy))
    assert rollout.completions is generation.completions
    for name in ("logprobs", "values", "kept_mass"):
        assert torch.equal(getattr(rollout, name), getattr(generation, name))
    assert rollout.scores.tolist() == list(range(len(TEXTS)))


@pytest.mark.parametrize(
    ("rows", "sizes"), [(None, [24]), (24, [24]), (1000, [24]), (10, [10, 10, 4]), (1, [1] * 24)]
)
def test_the_reference_reads_so_many_rows_at_once(rows, sizes):
    policy = tiny_policy()
    reference = moved(policy)
    generation, expected = rolled_out(policy, reference)
    seen = []
    hook = reference.language_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    scores = torch.arange(float(len(TEXTS)))
    rollout = measure(policy, reference, generation, scores, temperature=1.0, rows=rows)
    hook.remove()
    assert seen == sizes
    for name in ("ref_logprobs", "ref_hidden", "kl", "entropy"):
        assert_near(getattr(rollout, name), getattr(expected, name))
    assert torch.equal(rollout.logprobs, expected.logprobs)


def test_nothing_measured_has_a_gradient():
    policy = tiny_policy()
    _, rollout = rolled_out(policy, moved(policy))
    for name in ("ref_logprobs", "ref_hidden", "kl", "entropy"):
        assert not getattr(rollout, name).requires_grad
        assert not getattr(rollout, name).is_inference()

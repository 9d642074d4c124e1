"""Passes over copies in bf16: what autocast computes, and what is trained stays fp32."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from rlhf_exp.kernels.vocab_head import rollout_statistics
from rlhf_exp.kernels.working_weights import WorkingWeights, multiplied
from rlhf_exp.models.finetune import Full, LastLayers, Lora
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import compute_reference_in
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.types import Layout
from tests.builders import assert_near, cut, ragged_tokens, tiny_policy

TOKENS, MASK = ragged_tokens()
BF16 = torch.bfloat16
KINDS = {
    "full": Full(),
    "last_layers": LastLayers(num_layers_unfrozen=1),
    "lora": Lora(rank=4, alpha=8),
}
# Within a block: the matrices, each with a bias where there is one.
MATRICES = {
    "gpt2": (4, 4),
    "llama": (7, 0),
    "qwen2": (7, 3),
    "gpt_neox": (4, 4),
}


def policy_in_bf16(architecture: str = "gpt2", kind: str = "full") -> TransformerWithValueHead:
    policy = tiny_policy(architecture)
    KINDS[kind].attach(policy, seed=0)
    shake(policy)
    policy.compute_in(BF16)
    return policy


@torch.no_grad()
def shake(model: nn.Module, *, seed: int = 1) -> None:
    """Moves what is trained, adapters included, so that it has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def states(model: CausalTransformer) -> Tensor:
    return model.hidden_states(TOKENS, MASK)[MASK]


def backward(policy: TransformerWithValueHead, *, sign: float = 1.0) -> None:
    hidden = states(policy)
    weights = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
    (sign * (hidden * weights).sum() + policy.values(hidden).square().sum()).backward()


def gradients(policy: TransformerWithValueHead, run: Callable[[], object]) -> dict[str, Tensor]:
    policy.zero_grad()
    run()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def in_bf16(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dtype == BF16]


@pytest.mark.parametrize("kind", KINDS)
def test_passes_are_those_of_autocast(architecture: str, kind: str) -> None:
    policy = policy_in_bf16(architecture, kind)
    plain = copy.deepcopy(policy.language_model)
    with torch.no_grad():
        positions = (MASK.long().cumsum(dim=1) - 1).clamp(min=0)
        inputs = {"attention_mask": MASK.long(), "position_ids": positions}
        exact = plain.base_model(TOKENS, **inputs).last_hidden_state[MASK]
        with torch.autocast("cpu", dtype=BF16):
            expected = plain.base_model(TOKENS, **inputs).last_hidden_state[MASK]
        outside = states(policy)
        with policy.working():
            inside = states(policy)
    assert torch.equal(outside, expected)
    # Biases are added before the product is rounded, or after it.
    assert_near(inside, expected, tolerance=0.02)
    assert (inside - expected).abs().mean() < 0.2 * (exact - expected).abs().mean() + 1e-9
    assert not torch.equal(inside, exact)
    assert inside.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_land_in_the_weights(architecture: str, kind: str) -> None:
    policy = policy_in_bf16(architecture, kind)
    expected = gradients(policy, lambda: backward(policy))

    def within() -> None:
        with policy.working():
            backward(policy)

    seen = gradients(policy, within)
    assert seen.keys() == expected.keys()
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained - {"language_model.lm_head.weight", "language_model.embed_out.weight"} <= set(
        seen
    )
    for name, gradient in expected.items():
        assert seen[name].dtype == torch.float32
        assert (seen[name] - gradient).norm() <= 2e-2 * gradient.norm(), name


def test_gradients_of_several_passes_add_up(architecture: str) -> None:
    policy = policy_in_bf16(architecture)
    alone = []
    for sign in (1.0, -0.5):

        def once(sign: float = sign) -> None:
            with policy.working():
                backward(policy, sign=sign)

        alone.append(gradients(policy, once))

    def both() -> None:
        with policy.working():
            backward(policy, sign=1.0)
            backward(policy, sign=-0.5)

    for name, gradient in gradients(policy, both).items():
        assert torch.equal(gradient, alone[0][name] + alone[1][name]), name


def test_a_weight_used_twice_in_a_pass_gets_both_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    working = WorkingWeights(model, BF16, excluded=torch.zeros(1))
    x = torch.linspace(-1, 1, 12).view(3, 4)
    with torch.autocast("cpu", dtype=BF16):
        model(model(x)).float().square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with working.in_use(), torch.autocast("cpu", dtype=BF16):
        model(model(x)).float().square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert_near(parameter.grad, gradient, tolerance=1e-2)


def test_outside_of_the_block_the_model_is_what_it_was(architecture: str) -> None:
    policy = policy_in_bf16(architecture)
    before = [(name, id(parameter)) for name, parameter in policy.named_parameters()]
    values = copy.deepcopy(policy.state_dict())

    def assert_as_before() -> None:
        assert [(name, id(parameter)) for name, parameter in policy.named_parameters()] == before
        assert all(torch.equal(x, values[name]) for name, x in policy.state_dict().items())
        assert not policy.is_working

    assert_as_before()
    with policy.working():
        # The same names within it, of which some are copies.
        assert [name for name, _ in policy.named_parameters()] == [name for name, _ in before]
        assert policy.is_working
        assert in_bf16(policy)
    assert_as_before()
    with pytest.raises(RuntimeError, match="within"), policy.working():
        raise RuntimeError("within")
    assert_as_before()
    with policy.working():
        assert in_bf16(policy)
    assert_as_before()


def test_what_is_copied_are_the_blocks_matrices(architecture: str) -> None:
    policy = policy_in_bf16(architecture)
    with policy.working():
        names = in_bf16(policy)
    matrices, biases = MATRICES[architecture]
    assert sum(name.endswith("weight") for name in names) == 2 * matrices
    assert sum(name.endswith("bias") for name in names) == 2 * biases
    for name in names:
        assert not any(
            part in name for part in ("norm", "ln_", "wte", "wpe", "embed", "lm_head", "value_head")
        ), name
    assert policy.head.weight.dtype == torch.float32


def test_adapters_are_copied_too(architecture: str) -> None:
    policy = policy_in_bf16(architecture, "lora")
    adapters = [name for name, _ in policy.named_parameters() if "lora_" in name]
    with policy.working():
        names = set(in_bf16(policy))
        trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert set(adapters) <= names
    assert trained == {*adapters, *(n for n, _ in policy.named_parameters() if "value_head" in n)}


def test_frozen_weights_get_no_gradient(architecture: str) -> None:
    policy = policy_in_bf16(architecture, "last_layers")
    with policy.working():
        backward(policy)
        copies = {n: p for n, p in policy.named_parameters() if p.dtype == BF16}
    frozen = {n for n, p in policy.named_parameters() if not p.requires_grad}
    assert {n for n, p in copies.items() if not p.requires_grad} == frozen & copies.keys() != set()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
    assert all(each.grad is None for each in copies.values())


def test_copies_follow_the_weights() -> None:
    policy = policy_in_bf16()
    weight = policy.language_model.transformer.h[0].mlp.c_fc.weight
    with torch.no_grad(), policy.working():
        first = states(policy)
        weight.add_(0.5)
        assert torch.equal(states(policy), first)  # nobody has said so
        policy.weights_changed()
        second = states(policy)
        assert (second - first).abs().max() > 0.1
        assert torch.equal(policy.language_model.transformer.h[0].mlp.c_fc.weight, weight.to(BF16))
        weight.sub_(0.5)
    with torch.no_grad(), policy.working():  # a new block has the weights of its moment
        assert_near(states(policy), first, tolerance=1e-6)
    assert_near(states(policy), first, tolerance=0.02)


def test_steps_within_the_block_train_the_weights() -> None:
    policy, plain = policy_in_bf16(), policy_in_bf16()  # beside autocast over fp32 weights
    for each in (policy, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-3)
        with policy.working() if each is policy else nullcontext():
            for _ in range(3):
                optimizer.zero_grad()
                backward(each)
                optimizer.step()
                each.weights_changed()
    start = policy_in_bf16()
    for (name, ours), theirs, before in zip(
        policy.named_parameters(), plain.parameters(), start.parameters(), strict=True
    ):
        moved = (theirs - before).norm()
        assert (ours - theirs).norm() <= 0.1 * moved, name
        assert ours.dtype == torch.float32


def test_in_fp32_nothing_changes() -> None:
    policy = tiny_policy()
    expected = states(policy)
    policy.compute_in(BF16)
    policy.compute_in(torch.float32)
    assert policy.autocast_dtype is None
    with policy.working():
        assert not policy.is_working
        assert in_bf16(policy) == []
        assert torch.equal(states(policy), expected)
        policy.weights_changed()


def test_low_weights_and_other_layers_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[2].to(BF16)
    found = list(multiplied(model, excluded=model[3].weight))
    assert [(module, name) for module, name, _ in found] == [
        (model[0], "weight"),
        (model[0], "bias"),
    ]
    assert all(found[i][2] is p for i, p in enumerate(model[0].parameters()))


COMPLETIONS = cut(TOKENS, MASK, 6)
LAYOUT = Layout.of(COMPLETIONS)


@pytest.mark.parametrize("working", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled
def test_a_reference_is_at_no_distance_from_an_equal_policy(
    architecture: str, kind: str, working: bool
) -> None:
    policy = tiny_policy(architecture)
    reference = KINDS[kind].attach(policy, seed=0)
    policy.compute_in(BF16)
    compute_reference_in(reference, policy, BF16)
    with torch.no_grad():
        theirs = LAYOUT.pick(reference.completion_states(COMPLETIONS, LAYOUT))
        if working:
            with policy.working():
                ours = LAYOUT.pick(policy.completion_states(COMPLETIONS, LAYOUT))
                theirs = LAYOUT.pick(reference.completion_states(COMPLETIONS, LAYOUT))
        else:
            ours = LAYOUT.pick(policy.completion_states(COMPLETIONS, LAYOUT))
    statistics = rollout_statistics(
        ours, policy.head, LAYOUT.pick(COMPLETIONS.tokens), theirs, reference.head, temperature=1.0
    )
    assert statistics.kl.abs().max() < 1e-6
    # As the policy was in fp32, but for rounding.
    exact = tiny_policy(architecture).completion_states(COMPLETIONS, LAYOUT)
    assert_near(theirs, LAYOUT.pick(exact), tolerance=0.05)
    assert not torch.equal(theirs, LAYOUT.pick(exact))
    assert theirs.dtype == torch.float32


def test_a_reference_keeps_its_own_matrices_in_bf16(architecture: str) -> None:
    policy = tiny_policy(architecture)
    reference = Full().attach(policy, seed=0)
    before = copy.deepcopy(reference.state_dict())
    compute_reference_in(reference, policy, BF16)
    policy.compute_in(BF16)
    with policy.working():
        assert in_bf16(reference) == in_bf16(policy)
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, before[name].to(parameter.dtype))
        assert not parameter.requires_grad
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_a_shared_trunk_stays_shared_and_fp32(architecture: str) -> None:
    policy = tiny_policy(architecture)
    reference = LastLayers(num_layers_unfrozen=1).attach(policy, seed=0)
    shared = {n for n, p in policy.named_parameters() if not p.requires_grad}
    compute_reference_in(reference, policy, BF16)
    own = dict(policy.named_parameters())
    for name, parameter in reference.named_parameters():
        assert (parameter is own[name]) == (name in shared), name
        if name in shared:
            assert parameter.dtype == torch.float32
    matrices, biases = MATRICES[architecture]
    assert len(in_bf16(reference)) == matrices + biases
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_a_reference_in_fp32_stays(architecture: str) -> None:
    policy = tiny_policy(architecture)
    reference = Full().attach(policy, seed=0)
    compute_reference_in(reference, policy, torch.float32)
    assert in_bf16(reference) == []
    assert reference.autocast_dtype is None

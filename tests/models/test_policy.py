import copy
import itertools

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_exp.models.policy import TransformerWithValueHead, draw_linear, initialise_value_head
from rlhf_exp.models.transformer import CausalTransformer, position_ids
from tests.builders import (
    CONTEXT_LEN,
    WORDS,
    assert_near,
    plain_forward,
    ragged_tokens,
    tiny_policy,
    with_engine,
)

ENGINES = ("fast", "hooked")


def mixed_loss(policy: TransformerWithValueHead, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probs of the tokens and values, each position with a weight of its own sign and size."""
    logits, values = policy(tokens, mask)
    scored = logits[:, :-1].log_softmax(dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
    real = mask[:, :-1] & mask[:, 1:]
    weights = torch.linspace(-1, 2, scored.numel()).view_as(scored)
    return (weights * scored)[real].sum() + (weights * values[:, :-1].square())[real].sum()


def gradients(policy: TransformerWithValueHead, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    mixed_loss(policy, tokens, mask).backward()
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


def train(policy: TransformerWithValueHead, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        (mixed_loss(policy, *ragged_tokens(seed=10 + step)) / 20).backward()
        optimizer.step()


@pytest.mark.parametrize("engine", ENGINES)
def test_both_engines_are_a_plain_hugging_face_forward(architecture, engine):
    policy = tiny_policy(architecture, engine=engine)
    tokens, mask = ragged_tokens()
    logits, values = policy(tokens, mask)
    plain_logits, plain_values, _ = plain_forward(policy, tokens, mask)
    assert_near(logits[mask], plain_logits[mask])
    assert_near(values[mask], plain_values[mask])
    # And the padding is seen: without the mask the same tokens give something else.
    assert (policy(tokens)[0] - logits)[mask].abs().max() > 0.1


def test_both_engines_have_the_same_gradients_of_every_parameter(architecture):
    policy = tiny_policy(architecture)
    tokens, mask = ragged_tokens()
    fast = gradients(policy, tokens, mask)
    hooked = gradients(with_engine(policy, "hooked"), tokens, mask)
    assert fast.keys() == hooked.keys() == dict(policy.named_parameters()).keys()
    # The scale is that of all gradients together: some entries are 0 but for rounding (a bias of
    # the keys shifts all scores alike).
    scale = max(gradient.abs().max().item() for gradient in fast.values())
    for name in fast:
        torch.testing.assert_close(
            hooked[name],
            fast[name],
            rtol=1e-4,
            atol=1e-6 * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        assert fast[name].abs().max() > 1e-2, name


def test_the_engines_stay_together_over_optimizer_steps(architecture):
    policy = tiny_policy(architecture)
    hooked = with_engine(policy, "hooked")
    tokens, mask = ragged_tokens()
    before = hooked(tokens, mask)[0].detach()  # TransformerLens' view exists before the steps
    train(policy, torch.optim.AdamW(policy.parameters(), lr=1e-2), steps=5)
    logits, values = policy(tokens, mask)
    assert (logits - before)[mask].abs().max() > 0.1
    hooked_logits, hooked_values = hooked(tokens, mask)
    assert_near(hooked_logits[mask], logits[mask])
    assert_near(hooked_values[mask], values[mask])


def test_training_by_either_engine_leads_to_the_same_weights(architecture):
    policies = [tiny_policy(architecture, engine=engine) for engine in ENGINES]
    start = copy.deepcopy(policies[0].state_dict())
    for policy in policies:
        train(policy, torch.optim.SGD(policy.parameters(), lr=3e-2, momentum=0.9), steps=4)
    fast, hooked = (policy.state_dict() for policy in policies)
    assert fast.keys() == hooked.keys()
    for name in fast:
        assert_near(hooked[name], fast[name])
    assert max((fast[name] - start[name]).abs().max() for name in fast) > 0.05


@pytest.mark.parametrize("engine", ENGINES)
def test_extra_padding_on_the_left_changes_nothing(architecture, engine):
    policy = tiny_policy(architecture, engine=engine)
    tokens, mask = ragged_tokens(batch=3, seq=6)
    wider = torch.nn.functional.pad(tokens, (4, 0))
    wider_mask = torch.nn.functional.pad(mask, (4, 0))
    for narrow, wide in zip(policy(tokens, mask), policy(wider, wider_mask), strict=True):
        assert_near(wide[:, 4:][mask], narrow[mask])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_tokens_the_padding_holds_changes_nothing(architecture, engine):
    policy = tiny_policy(architecture, engine=engine)
    tokens, mask = ragged_tokens()
    garbage = torch.where(mask, tokens, torch.arange(tokens.shape[1]) % (4 + len(WORDS)))
    assert not torch.equal(garbage, tokens)
    for clean, dirty in zip(policy(tokens, mask), policy(garbage, mask), strict=True):
        assert_near(dirty[mask], clean[mask], tolerance=1e-6)


def test_padding_on_the_right_changes_nothing(architecture):
    policy = tiny_policy(architecture)
    tokens, mask = ragged_tokens(batch=3, seq=6)
    longer = torch.nn.functional.pad(tokens, (0, 2), value=5)
    for short, long in zip(
        policy(tokens, mask), policy(longer, torch.nn.functional.pad(mask, (0, 2))), strict=True
    ):
        assert_near(long[:, :6][mask], short[mask])


@pytest.mark.parametrize("engine", ENGINES)
def test_no_mask_means_no_padding(architecture, engine):
    policy = tiny_policy(architecture, engine=engine)
    tokens, _ = ragged_tokens()
    everything = torch.ones_like(tokens, dtype=torch.bool)
    for without, explicit in zip(policy(tokens), policy(tokens, everything), strict=True):
        assert torch.equal(without, explicit)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_value_loss_alone_trains_the_first_block(architecture, engine):
    policy = tiny_policy(architecture, engine=engine)
    tokens, mask = ragged_tokens()
    policy(tokens, mask)[1][mask].square().mean().backward()
    block = policy.language_model.base_model.get_submodule(
        "h.0" if architecture == "gpt2" else "layers.0"
    )
    assert max(parameter.grad.abs().max() for parameter in block.parameters()) > 1e-3
    assert policy.language_model.get_input_embeddings().weight.grad.abs().max() > 1e-3
    # The value does not pass through the unembedding (GPT-2's is the embedding).
    unembedding = policy.language_model.get_output_embeddings().weight
    if unembedding is not policy.language_model.get_input_embeddings().weight:
        assert unembedding.grad is None or not unembedding.grad.any()


def test_hidden_states_are_the_final_ones(architecture):
    policy = tiny_policy(architecture)
    tokens, mask = ragged_tokens()
    logits, values, hidden = plain_forward(policy, tokens, mask)
    ours = policy.hidden_states(tokens, mask)
    assert_near(ours[mask], hidden[mask])
    assert_near(policy.unembed(ours)[mask], logits[mask])
    assert_near(policy.values(ours)[mask], values[mask])


@pytest.mark.parametrize("count", [1, 2])
def test_the_last_layers_are_the_blocks_outputs_and_the_final_norms(architecture, count):
    policy = tiny_policy(architecture)
    tokens, mask = ragged_tokens()
    base = policy.language_model.base_model
    name = "h.0" if architecture == "gpt2" else "layers.0"
    outputs = []
    hook = base.get_submodule(name).register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    final = policy.hidden_states(tokens, mask)
    hook.remove()
    [first] = outputs
    first = first[0] if isinstance(first, tuple) else first
    layers = policy.last_layers(tokens, mask, count)
    assert len(layers) == count
    for ours, expected in zip(layers, [first, final][-count:], strict=True):
        assert_near(ours[mask], expected[mask], tolerance=1e-6)
    assert (first - final)[mask].abs().max() > 0.1


def test_hidden_states_in_pieces_over_a_cache(architecture):
    policy = tiny_policy(architecture)
    tokens, mask = ragged_tokens(batch=3, seq=7)
    whole = policy.hidden_states(tokens, mask)
    cache = DynamicCache(config=policy.language_model.config)
    pieces = [
        policy.hidden_states(tokens[:, start:end], mask[:, :end], cache)
        for start, end in itertools.pairwise((0, 3, 4, 7))
    ]
    assert [piece.shape[1] for piece in pieces] == [3, 1, 3]
    assert_near(torch.cat(pieces, dim=1)[mask], whole[mask])


def test_the_context_is_that_of_the_model(architecture):
    assert tiny_policy(architecture).context_len == CONTEXT_LEN


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_is_off_in_training_mode_too(architecture, engine):
    policy = tiny_policy(architecture, engine=engine, dropout=0.5)
    plain = tiny_policy(architecture, engine=engine)
    tokens, mask = ragged_tokens()
    policy.train()
    assert policy.training
    assert policy.value_head.training
    assert not policy.language_model.training
    first, second = policy(tokens, mask), policy(tokens, mask)
    for one, two, without in zip(first, second, plain(tokens, mask), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, without)
    # The dropout is there: the module itself in training mode shows it.
    policy.language_model.train()
    loud = [plain_forward(policy, tokens, mask)[0] for _ in range(2)]
    assert (loud[0] - loud[1])[mask].abs().max() > 0.1
    policy.eval()
    assert not policy.training
    assert torch.equal(policy(tokens, mask)[0], first[0])


def test_the_frozen_reference_is_the_policy_of_its_moment(architecture):
    policy = tiny_policy(architecture, dropout=0.5)
    tokens, mask = ragged_tokens()
    reference = policy.frozen_reference()
    assert type(reference) is CausalTransformer
    at_start = reference.unembed(reference.hidden_states(tokens, mask))
    assert torch.equal(at_start, policy(tokens, mask)[0])
    assert not at_start.requires_grad
    assert all(parameter.requires_grad for parameter in policy.parameters())

    train(policy, torch.optim.AdamW(policy.parameters(), lr=1e-2), steps=2)
    reference.train()
    later = reference.unembed(reference.hidden_states(tokens, mask))
    assert torch.equal(later, at_start)
    assert (policy(tokens, mask)[0] - at_start)[mask].abs().max() > 0.05
    for parameter in reference.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
    mine = {parameter.data_ptr() for parameter in policy.parameters()}
    assert mine.isdisjoint(parameter.data_ptr() for parameter in reference.parameters())


def test_the_value_head_is_two_linear_layers_with_a_relu():
    policy = tiny_policy()
    hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    weights = policy.value_head.state_dict()
    inner = (hidden @ weights["0.weight"].T + weights["0.bias"]).clamp(min=0)
    assert inner.shape == (7, 64)
    by_hand = (inner @ weights["2.weight"].T + weights["2.bias"])[:, 0]
    assert_near(policy.values(hidden), by_hand, tolerance=1e-6)


def drawn(policy: TransformerWithValueHead, seed: int, *, zero_last: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before = torch.get_rng_state()
    initialise_value_head(policy.value_head, generator=generator, zero_last=zero_last)
    assert torch.equal(torch.get_rng_state(), before)
    return copy.deepcopy(policy.value_head.state_dict())


def test_the_value_head_is_drawn_by_the_seed():
    policy = tiny_policy()
    first, again, other = (drawn(policy, seed, zero_last=False) for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
        # Uniform within 1/sqrt(inputs): 16 of the first layer, 64 of the last.
        bound = {"0": 1 / 4, "2": 1 / 8}[name[0]]
        assert tensor.abs().max() <= bound
        if tensor.numel() > 50:
            assert tensor.max() > 0.8 * bound
            assert tensor.min() < -0.8 * bound
    assert first["0.weight"].std() == pytest.approx(1 / 4 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_is_drawn_as_pytorch_draws_it(dtype):
    linear = torch.nn.Linear(25, 400, dtype=dtype)
    parameters = [linear.weight, linear.bias]
    before = torch.get_rng_state()
    draw_linear(linear, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert linear.weight is parameters[0]  # an optimizer may hold it
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        uniform = torch.rand(parameter.shape, generator=generator) * 2 - 1
        # Bits: seven after the leading one of a bfloat16.
        torch.testing.assert_close(
            parameter.detach(), (uniform / 5).to(dtype), rtol=1e-2, atol=1e-6
        )
        assert parameter.requires_grad
        assert 0.19 < parameter.max() <= 0.2
        assert -0.2 <= parameter.min() < -0.19


@pytest.mark.parametrize("engine", ENGINES)
def test_zero_last_makes_every_value_zero_and_can_learn(engine):
    policy = tiny_policy(engine=engine)
    zeroed = drawn(policy, 1, zero_last=True)
    assert torch.equal(zeroed["0.weight"], drawn(policy, 1, zero_last=False)["0.weight"])
    drawn(policy, 1, zero_last=True)
    tokens, mask = ragged_tokens()
    values = policy(tokens, mask)[1]
    assert torch.equal(values, torch.zeros_like(values))
    (values - 1).square().mean().backward()
    assert policy.value_head[2].weight.grad.abs().max() > 1e-3


def test_position_ids():
    mask = [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert position_ids(torch.tensor(mask, dtype=torch.bool)).tolist() == [
        [0, 1, 2, 3],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
        [0, 1, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 0, 0],
    ]

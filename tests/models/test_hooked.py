import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rlhf_exp.kernels.attention import ATTENTION
from rlhf_exp.models.hooked import VALUE_HEAD_HOOK
from rlhf_exp.models.loading import load_policy
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.saving import save_policy
from tests.builders import (
    assert_near,
    build_tokenizer,
    plain_forward,
    ragged_tokens,
    stretch,
    tiny_policy,
)

TOKENS, MASK = ragged_tokens()


def bridge_logits(bridge, tokens: Tensor = TOKENS, mask: Tensor = MASK) -> Tensor:
    return bridge(tokens, attention_mask=mask.long(), return_type="logits")


def optimizer_steps(policy: TransformerWithValueHead, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        logits, values = policy(TOKENS, MASK)
        (logits.log_softmax(dim=-1)[..., 5].mean() + values.square().mean()).backward()
        optimizer.step()


def test_a_bridge_shows_the_weights_of_its_moment(architecture):
    policy = tiny_policy(architecture)
    before = bridge_logits(policy.hooked())
    assert_near(before[MASK], policy(TOKENS, MASK)[0][MASK])
    optimizer_steps(policy)
    after = bridge_logits(policy.hooked())
    assert_near(after[MASK], policy(TOKENS, MASK)[0][MASK])
    assert (after - before)[MASK].abs().max() > 0.05


@pytest.mark.parametrize("shared", ["gpt2", "llama", "qwen2"])
def test_where_nothing_is_copied_a_bridge_follows_the_optimizer(shared):
    policy = tiny_policy(shared)
    bridge = policy.hooked()
    optimizer_steps(policy)
    assert_near(bridge_logits(bridge)[MASK], policy(TOKENS, MASK)[0][MASK])


def storages(module: nn.Module) -> dict[int, int]:
    """Bytes of each storage under a module's parameters, by its address."""
    tensors = [parameter.untyped_storage() for parameter in module.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in tensors}


def test_a_bridge_shares_the_policys_memory(architecture):
    policy = tiny_policy(architecture)
    model, bridge = storages(policy.language_model), storages(policy.hooked())
    assert model.keys() <= bridge.keys()
    # GPT-NeoX interleaves queries, keys and values, and TransformerLens copies those: of each of
    # two layers a [48, 16] matrix and its bias.
    copied = sum(bridge.values()) - sum(model.values())
    assert copied == (2 * 4 * (48 * 16 + 48) if architecture == "gpt_neox" else 0)


def test_the_policy_stays_a_plain_module(architecture, tmp_path):
    policy = tiny_policy(architecture)
    logits, values = policy(TOKENS, MASK)
    kinds = [(name, type(module)) for name, module in policy.named_modules()]
    weights = copy.deepcopy(policy.state_dict())
    attention = policy.language_model.config._attn_implementation
    bridge_logits(policy.hooked())
    policy.view.run_with_value_head(policy.value_head, TOKENS, MASK)

    assert [(name, type(module)) for name, module in policy.named_modules()] == kinds
    assert policy.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.state_dict().items())
    assert policy.language_model.config._attn_implementation == attention == ATTENTION
    assert torch.equal(policy(TOKENS, MASK)[0], logits)
    reloaded = load_policy(save_policy(policy, tmp_path))
    assert torch.equal(reloaded(TOKENS, MASK)[0], logits)
    assert torch.equal(reloaded(TOKENS, MASK)[1], values)


def test_the_hooks_see_the_activations_of_the_model(architecture):
    policy = tiny_policy(architecture)
    bridge = policy.hooked()
    logits, cache = bridge.run_with_cache(TOKENS, attention_mask=MASK.long())
    outside = policy.language_model(
        input_ids=TOKENS, attention_mask=MASK.long(),
        position_ids=(MASK.long().cumsum(dim=1) - 1).clamp(min=0), output_hidden_states=True,
    )  # fmt: skip
    assert_near(logits[MASK], outside.logits[MASK])
    assert_near(cache["blocks.0.hook_resid_post"][MASK], outside.hidden_states[1][MASK])
    assert_near(cache[VALUE_HEAD_HOOK][MASK], outside.hidden_states[-1][MASK])
    pattern = cache["blocks.1.attn.hook_pattern"]
    assert pattern.shape == (5, 2, 9, 9)
    # Nothing attends to padding on the left: row i has i columns of it.
    assert all(pattern[row, :, row:, :row].abs().max() < 1e-6 for row in range(1, 5))


def zero(activation: Tensor, hook: object) -> Tensor:
    return torch.zeros_like(activation)


def test_an_edit_by_a_hook_stays_in_its_bridge(architecture):
    policy = tiny_policy(architecture)
    clean = policy(TOKENS, MASK)[0]
    hooked_clean = policy.view.run_with_value_head(policy.value_head, TOKENS, MASK)[0]
    bridge = policy.hooked()
    bridge.add_hook("blocks.0.hook_mlp_out", zero)
    assert (bridge_logits(bridge) - clean)[MASK].abs().max() > 0.1
    assert torch.equal(policy(TOKENS, MASK)[0], clean)
    again = policy.view.run_with_value_head(policy.value_head, TOKENS, MASK)[0]
    assert torch.equal(again, hooked_clean)
    assert_near(bridge_logits(policy.hooked())[MASK], clean[MASK])


def test_the_view_takes_hooks_for_one_call(architecture):
    policy = tiny_policy(architecture)
    clean = policy(TOKENS, MASK)[0]
    edited = policy.view.call(
        lambda bridge: bridge.run_with_hooks(
            TOKENS,
            return_type="logits",
            fwd_hooks=[("blocks.0.hook_mlp_out", zero)],
            attention_mask=MASK.long(),
        )
    )
    assert (edited - clean)[MASK].abs().max() > 0.1
    assert_near(policy.view.call(bridge_logits)[MASK], clean[MASK])


def test_the_view_computes_what_a_plain_forward_does(architecture):
    policy = tiny_policy(architecture)
    seen = policy.view.run_with_value_head(policy.value_head, TOKENS, MASK)
    for ours, plain in zip(seen, plain_forward(policy, TOKENS, MASK), strict=True):
        assert_near(ours[MASK], plain[MASK])


def test_a_bridge_is_in_evaluation_mode_and_says_what_it_is(architecture):
    policy = tiny_policy(architecture, dropout=0.5)
    policy.train()
    bridge = policy.hooked()
    assert not bridge.training
    assert torch.equal(bridge_logits(bridge), bridge_logits(bridge))
    assert_near(bridge_logits(bridge)[MASK], policy(TOKENS, MASK)[0][MASK])
    assert bridge.cfg.n_layers == 2
    assert bridge.cfg.d_model == 16
    assert bridge.to_tokens("one two", prepend_bos=True).tolist() == [[1, 5, 6]]
    assert policy.tokenizer("one two", add_special_tokens=False)["input_ids"] == [5, 6]


class Louder(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def test_a_weight_that_transformer_lens_computes_is_refused():
    model = tiny_policy("gpt2").language_model
    parametrize.register_parametrization(model.transformer.h[0].attn.c_attn, "weight", Louder())
    policy = TransformerWithValueHead(model, tiny_policy("gpt2").tokenizer, engine="hooked")
    with pytest.raises(ValueError, match=r"engine=hooked: TransformerLens computes .*attn\.q"):
        policy(TOKENS, MASK)


def test_looking_inside_draws_no_random_numbers(architecture):
    policy = tiny_policy(architecture)
    before = torch.get_rng_state()
    policy.hooked()
    policy.view.run_with_value_head(policy.value_head, TOKENS, MASK)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_policy_has_a_view_of_its_own():
    policies = tiny_policy(), tiny_policy(seed=1)
    views = [policy.view for policy in policies]
    seen = [view.call(bridge_logits) for view in views]
    assert (seen[0] - seen[1])[MASK].abs().max() > 0.1
    for policy, view, logits in zip(policies, views, seen, strict=True):
        assert policy.view is view
        assert_near(logits[MASK], policy(TOKENS, MASK)[0][MASK])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
    ],
)
def test_a_scale_and_a_soft_cap_are_in_its_logits(name, options):
    config = getattr(hf, f"{name}Config")(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        architectures=[f"{name}ForCausalLM"], **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    stretch(model, seed=0)
    policy = TransformerWithValueHead(model, build_tokenizer(), engine="hooked")
    for ours, plain in zip(policy(TOKENS, MASK), plain_forward(policy, TOKENS, MASK), strict=False):
        assert_near(ours[MASK], plain[MASK])

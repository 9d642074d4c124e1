"""The references: the policy as it was, whatever of it is trained, and in how much memory."""

import copy

import pytest
import torch
from torch import Tensor, nn

from rlhf_exp.functional.logprobs import completion_part
from rlhf_exp.models.finetune import Finetune, Full, LastLayers, Lora
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import (
    Memory,
    Reference,
    compute_reference_in,
    reference_hash,
    resident_memory,
)
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.settings import ConfigError
from rlhf_exp.types import Layout
from tests.builders import assert_near, cut, ragged_tokens, tiny_policy

TOKENS, MASK = ragged_tokens()
PROMPT = 6
COMPLETIONS = cut(TOKENS, MASK, PROMPT)
LAYOUT = Layout.of(COMPLETIONS)
KINDS = {
    "full": Full(),
    "last_layers": LastLayers(num_layers_unfrozen=1),
    "lora": Lora(rank=4, alpha=8),
}
LAST = {"gpt2": ("h.1.", "ln_f."), "gpt_neox": ("layers.1.", "final_layer_norm.")}


def is_trained(kind: str, architecture: str, name: str) -> bool:
    """Whether a parameter of the policy, by its name, is one that is trained."""
    if kind == "full" or name.startswith("value_head."):
        return True
    if kind == "lora":
        return "lora_" in name
    parts = LAST.get(architecture, ("layers.1.", "norm."))
    return name.removeprefix("language_model.").partition(".")[2].startswith(parts)


def hidden_of(reference: Reference) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        hidden = reference.completion_states(COMPLETIONS, LAYOUT)
        return hidden, reference.unembed(hidden)


def states_before(model: CausalTransformer) -> tuple[Tensor, Tensor]:
    """The same by a plain pass over the whole sequences."""
    with torch.no_grad():
        hidden = model.hidden_states(TOKENS, MASK)
        return (
            completion_part(hidden, PROMPT),
            completion_part(model.language_model.get_output_embeddings()(hidden), PROMPT),
        )


def train(policy: TransformerWithValueHead, steps: int = 3) -> None:
    """A few large optimizer steps on everything that is trained."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        logits, values = policy(TOKENS, MASK)
        (logits.log_softmax(dim=-1)[..., 5].mean() + values.square().mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_is_the_policy_as_it_was(architecture: str, kind: str) -> None:
    policy = tiny_policy(architecture)
    before = policy.frozen_reference()
    values = policy(TOKENS, MASK)[1]
    reference = KINDS[kind].attach(policy, seed=0)
    # Nothing has an effect yet, adapters included.
    logits, same_values = policy(TOKENS, MASK)
    expected = states_before(before)
    assert_near(completion_part(logits, PROMPT), expected[1], tolerance=1e-6)
    assert_near(same_values, values, tolerance=1e-6)
    start = copy.deepcopy(policy.state_dict())
    train(policy)
    for ours, theirs in zip(hidden_of(reference), expected, strict=True):
        assert_near(ours, theirs, tolerance=1e-6)
    assert torch.equal(reference.head.weight, before.language_model.get_output_embeddings().weight)
    assert (states_before(policy)[1] - expected[1]).abs().max() > 0.05
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == is_trained(kind, architecture, name), name
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("kind", ["full", "last_layers"])
def test_nothing_trains_a_reference(architecture: str, kind: str) -> None:
    policy = tiny_policy(architecture)
    reference = KINDS[kind].attach(policy, seed=0)
    assert not any(p.requires_grad for p in reference.parameters())
    reference.train()
    assert not reference.language_model.training


def storages(module: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


def test_a_shared_trunk_is_there_once(architecture: str) -> None:
    policy = tiny_policy(architecture)
    reference = KINDS["last_layers"].attach(policy, seed=0)
    own = dict(policy.named_parameters())
    for name, parameter in reference.named_parameters():
        trained = is_trained("last_layers", architecture, name)
        assert (parameter.data_ptr() != own[name].data_ptr()) == trained, name
        assert torch.equal(parameter, own[name])
    assert len(storages(reference) - storages(policy)) == sum(
        is_trained("last_layers", architecture, name) for name in own if "value_head" not in name
    )
    # Buffers (causal masks, rotary frequencies) too.
    for ours, theirs in zip(policy.buffers(), reference.buffers(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()


def test_adapters_need_no_second_model() -> None:
    policy = tiny_policy()
    reference = KINDS["lora"].attach(policy, seed=0)
    assert not isinstance(reference, nn.Module)
    adapted = policy(TOKENS, MASK)[0]
    train(policy)
    hidden = hidden_of(reference)[0]
    # They are on again after each call, also after one that failed.
    with pytest.raises(IndexError):
        reference.completion_states(cut(TOKENS + 100, MASK, PROMPT), LAYOUT)
    assert (policy(TOKENS, MASK)[0] - adapted)[MASK].abs().max() > 0.05
    assert (states_before(policy)[0] - hidden).abs().max() > 0.05
    assert all(p.requires_grad for n, p in policy.named_parameters() if "lora_" in n)


def test_all_blocks_can_be_unfrozen_and_no_more(architecture: str) -> None:
    policy = tiny_policy(architecture)
    LastLayers(num_layers_unfrozen=2).attach(policy, seed=0)
    frozen = {n for n, p in policy.language_model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[-2] for name in frozen} <= {
        "wte", "wpe", "embed_tokens", "lm_head", "embed_in", "embed_out",
    }  # fmt: skip
    with pytest.raises(
        ConfigError,
        match=r"^the model has 2 blocks, fewer than finetune\.num_layers_unfrozen=3$",
    ):
        LastLayers(num_layers_unfrozen=3).attach(tiny_policy(architecture), seed=0)


# GPT-2 of width 16 in fp32: embeddings of 16 tokens and 32 positions, a block of two layer norms,
# attention (16 to 48, 16 to 16) and an MLP (16 to 64 to 16), a last layer norm; the value head.
BLOCK = 2 * 32 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16)
NORM = 32
MODEL = (16 + 32) * 16 + 2 * BLOCK + NORM
HEAD = (16 * 64 + 64) + (64 + 1)
# Of rank 4, for each of a block's four matrices.
ADAPTERS = 2 * 4 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))


@pytest.mark.parametrize(
    ("kind", "policy_size", "reference_size", "trained"),
    [
        ("full", MODEL + HEAD, MODEL, MODEL + HEAD),
        ("last_layers", MODEL + HEAD, BLOCK + NORM, BLOCK + NORM + HEAD),
        ("lora", MODEL + HEAD + ADAPTERS, 0, ADAPTERS + HEAD),
    ],
)
def test_memory_by_hand(kind: str, policy_size: int, reference_size: int, trained: int) -> None:
    policy = tiny_policy()
    memory = resident_memory(policy, KINDS[kind].attach(policy, seed=0))
    assert memory == Memory(
        policy=4 * policy_size,
        reference=4 * reference_size,
        gradients=4 * trained,
        optimizer=8 * trained,
    )
    assert memory.total == 4 * (policy_size + reference_size + 3 * trained)


def test_memory_of_a_base_in_bf16() -> None:
    policy = tiny_policy()
    policy.language_model.to(torch.bfloat16)
    memory = resident_memory(policy, KINDS["lora"].attach(policy, seed=0))
    assert memory.policy == 2 * MODEL + 4 * (HEAD + ADAPTERS)
    assert memory.gradients == 4 * (HEAD + ADAPTERS)


def test_memory_as_a_line() -> None:
    mib = 2**20
    memory = Memory(policy=3 * mib, reference=mib // 2, gradients=2 * mib, optimizer=4 * mib)
    assert str(memory) == (
        "memory in MiB: weights 3.0  reference 0.5  gradients 2.0  Adam 4.0  total 9.5"
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_that_are_trained_must_be_fp32(dtype: str) -> None:
    low = Pretrained(base_model="gpt2", dtype=dtype)
    for kind in ("full", "last_layers"):
        [problem] = KINDS[kind].check(low)
        assert problem.startswith(f"model.dtype={dtype}: weights that are trained must be fp32")
        assert KINDS[kind].check(Pretrained(base_model="gpt2")) == []
        assert KINDS[kind].check(Scratch()) == []
    assert KINDS["lora"].check(low) == []


def test_transformer_lens_knows_no_adapters() -> None:
    for model in (Pretrained(base_model="gpt2", engine="hooked"), Scratch(engine="hooked")):
        assert KINDS["lora"].check(model) == [
            "finetune=lora needs model.engine=fast; policy.hooked() shows the merged model"
        ]
        assert KINDS["full"].check(model) == KINDS["last_layers"].check(model) == []
    assert KINDS["lora"].check(Scratch()) == []


def test_kinds_are_settings_of_the_reference_group() -> None:
    assert all(isinstance(kind, Finetune) for kind in KINDS.values())
    for kind in KINDS.values():
        assert isinstance(kind.attach(tiny_policy(), seed=0), Reference)


def test_copies_that_passes_compute_with_are_counted() -> None:
    policy = tiny_policy()
    before = resident_memory(policy, KINDS["full"].attach(policy, seed=0))
    policy.compute_in(torch.bfloat16)
    after = resident_memory(policy, KINDS["full"].attach(policy, seed=0))
    linear = sum(
        p.numel()
        for name, p in policy.language_model.named_parameters()
        if ".attn." in name or ".mlp." in name
    )
    assert after.policy - before.policy == 2 * linear


def hash_of(kind: str, **policy: object) -> tuple[TransformerWithValueHead, Reference, str]:
    model = tiny_policy(**policy)
    reference = KINDS[kind].attach(model, seed=0)
    return model, reference, reference_hash(reference, model)


def test_the_hash_is_of_the_model_whatever_is_trained_of_it():
    hashes = {hash_of(kind)[2] for kind in KINDS}
    assert len(hashes) == 1
    assert hash_of("full", seed=1)[2] not in hashes


@pytest.mark.parametrize("kind", KINDS)
def test_the_hash_changes_with_every_weight_that_the_reference_uses(kind):
    policy, reference, before = hash_of(kind)
    model = reference if isinstance(reference, CausalTransformer) else policy
    weights = dict(model.language_model.named_parameters())
    held = {name: p for name, p in weights.items() if "lora_" not in name}
    assert any(p is model.head.weight for p in held.values())
    for parameter in held.values():
        with torch.no_grad():
            kept = parameter.flatten()[-1].item()
            parameter.view(-1)[-1] += 1.0
            assert reference_hash(reference, policy) != before
            parameter.view(-1)[-1] = kept
    assert reference_hash(reference, policy) == before


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_hash_alone(kind):
    policy, reference, before = hash_of(kind)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 1.0
    assert reference_hash(reference, policy) == before


def test_the_hash_of_rounded_weights_is_another_and_stays():
    policy, reference, before = hash_of("full")
    policy.compute_in(torch.bfloat16)
    compute_reference_in(reference, policy, torch.bfloat16)
    rounded = reference_hash(reference, policy)
    assert rounded != before
    with policy.working():
        assert reference_hash(reference, policy) == rounded

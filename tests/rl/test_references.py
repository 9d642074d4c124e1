"""PPO with each reference: the KL that a full copy would give, and the weights that it trains."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_exp.models.engines import ENGINES
from rlhf_exp.models.finetune import Finetune, Full, LastLayers, Lora
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.measure import measure
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.types import Rollout

from ..builders import ARCHITECTURES, assert_near
from .toy import RAGGED, collect, loss, parts, phase, ppo_with, saved_model, start

KINDS = {
    "full": Full(),
    "last_layers": LastLayers(num_layers_unfrozen=1),
    "lora": Lora(rank=4, alpha=8),
}
# What of these models is trained with the last block unfrozen.
LAST = {
    "gpt2": ("transformer.h.1.", "transformer.ln_f."),
    "llama": ("model.layers.1.", "model.norm."),
    "qwen2": ("model.layers.1.", "model.norm."),
    "gpt_neox": ("gpt_neox.layers.1.", "gpt_neox.final_layer_norm."),
}
SMALL = ppo_with(batch_size=8, num_minibatches=2)
QUICK = AdamWSettings(base_lr=2e-2, head_lr=2e-2)
SAMPLER = CachedSampler(gen_len=4, stop_at_eos=True, temperature=1.2)


def actors_of(
    path: Path, architecture: str, reference: Finetune, **model: str
) -> tuple[Setup, TrainState]:
    return start(
        SMALL,
        path,
        task=RAGGED,
        model=saved_model(path / "model", architecture=architecture, **model),
        finetune=reference,
        sampler=SAMPLER,
        optimizer=QUICK,
    )


def against(setup: Setup, reference: object) -> Rollout:
    """A rollout of the current weights, measured."""
    rows = torch.arange(4).repeat(2)
    prompts = setup.train_prompts[rows]
    generation = SAMPLER(setup.policy, prompts, torch.Generator().manual_seed(3))
    return measure(setup.policy, reference, generation, torch.zeros(8), temperature=1.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kl_is_that_to_a_full_copy_taken_before(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    reference = KINDS[kind]
    setup, state = actors_of(tmp_path, architecture, reference)
    other, _ = actors_of(tmp_path, architecture, Full())
    full_copy = other.policy  # the same model, loaded again
    assert against(setup, setup.reference).kl.abs().max() < 1e-6
    before = copy.deepcopy(setup.policy.state_dict())
    for _ in range(2):
        phase(SMALL, setup, state)
    ours, expected = against(setup, setup.reference), against(setup, full_copy)
    assert ours.kl.max() > 0.05
    for name in ("kl", "ref_logprobs", "ref_hidden"):
        assert_near(getattr(ours, name), getattr(expected, name))

    for name, parameter in setup.policy.named_parameters():
        rest = name.removeprefix("language_model.")
        trained = (
            kind == "full"
            or name.startswith("value_head.")
            or (kind == "lora" and "lora_" in name)
            or (kind == "last_layers" and rest.startswith(LAST[architecture]))
        )
        assert torch.equal(parameter, before[name]) != trained, name


def gradients(setup: Setup, state: TrainState) -> dict[str, Tensor]:
    """Of the loss on a rollout after a phase has moved the policy away from its reference."""
    phase(SMALL, setup, state)
    experience = collect(SMALL, setup, state)
    state.optimizer.zero_grad()
    loss(SMALL, setup, experience).loss.backward()
    return {n: p.grad.clone() for n, p in setup.policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_hooked_engine_trains_the_weights_above_a_shared_trunk(
    architecture: str, tmp_path: Path
) -> None:
    kind = KINDS["last_layers"]
    fast, state = actors_of(tmp_path, architecture, kind)
    hooked, hooked_state = actors_of(tmp_path, architecture, kind)
    hooked.policy.engine = ENGINES["hooked"](hooked.policy)
    hooked.policy.load_state_dict(fast.policy.state_dict())
    expected, seen = gradients(fast, state), gradients(hooked, hooked_state)
    assert seen.keys() == expected.keys()
    assert {n.removeprefix("language_model.") for n in seen if "value_head" not in n} == {
        n
        for n, _ in fast.policy.language_model.named_parameters()
        if n.startswith(LAST[architecture])
    }
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=0, atol=1e-3 * scale)
    before = dict(fast.policy.named_parameters())
    for name, parameter in hooked.policy.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_train_on_a_base_in_bf16(architecture: str, tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", architecture=architecture)
    low = type(model)(base_model=model.base_model, dtype="bf16")
    assert SMALL.check(parts(model=low, finetune=KINDS["lora"])) == []
    setup, state = start(
        SMALL, tmp_path, task=RAGGED, model=low, finetune=KINDS["lora"], optimizer=QUICK
    )
    before = copy.deepcopy(setup.policy.state_dict())
    for _ in range(2):
        metrics = phase(SMALL, setup, state)
        assert all(math.isfinite(value) for value in metrics.values())
    for name, parameter in setup.policy.named_parameters():
        trained = "lora_" in name or name.startswith("value_head.")
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
        assert torch.equal(parameter, before[name]) != trained, name
    assert metrics["objective/kl"] > 0


@pytest.mark.parametrize("kind", ["full", "last_layers"])
def test_weights_in_bf16_are_trained_by_adapters_alone(kind: str, tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    low = type(model)(base_model=model.base_model, dtype="bf16")
    [problem] = SMALL.check(parts(model=low, finetune=KINDS[kind]))
    assert "model.dtype=bf16" in problem
    assert "finetune=lora" in problem


def test_the_adapters_are_drawn_from_the_runs_seed(tmp_path: Path) -> None:
    def drawn() -> list[Tensor]:
        setup, _ = actors_of(tmp_path, "gpt2", KINDS["lora"])
        return [p for n, p in setup.policy.named_parameters() if "lora_A" in n]

    torch.manual_seed(5)
    first = drawn()
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(), strict=True))

"""The state of PPO: all of it comes back, and nothing else is taken for it."""

import copy
from pathlib import Path

import pytest
import torch

from rlhf_exp.models.finetune import Finetune, Full, LastLayers, Lora
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rl.state import TrainState
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages import ppo as ppo_stage
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.saver import split_state
from rlhf_exp.training.schedules import WarmupDecay

from ..states import assert_equal_states, through_a_file
from .toy import RAGGED, phase, ppo_with, start

SMALL = ppo_with(total_phases=6, batch_size=6, num_minibatches=2)
KINDS = {
    "full": Full(),
    "last_layers": LastLayers(num_layers_unfrozen=1),
    "lora": Lora(),
}


def started(path: Path, reference: Finetune, *, d_model: int = 16) -> tuple[Setup, TrainState]:
    model = Scratch(num_layers=2, d_model=d_model, num_heads=2, context_len=16)
    optimizer = AdamWSettings(base_lr=1e-2, head_lr=2e-2, weight_decay=0.1)
    return start(
        SMALL, path, task=RAGGED, model=model, finetune=reference, optimizer=optimizer,
        schedule=WarmupDecay(warmup_steps=4),
    )  # fmt: skip


def advance(setup: Setup, state: TrainState, phases: int) -> list[dict[str, float]]:
    metrics = [phase(SMALL, setup, state) for _ in range(phases)]
    return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in metrics]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_comes_back(kind: str, tmp_path: Path) -> None:
    setup, state = started(tmp_path, KINDS[kind])
    advance(setup, state, 1)
    saved = through_a_file(state.state_dict(), tmp_path)
    assert_equal_states(saved, state.state_dict())
    assert len(saved["prompts"]["pending"]) > 0
    expected = advance(setup, state, 2)

    others, other = started(tmp_path, KINDS[kind])
    advance(others, other, 2)  # it stood elsewhere
    other.load_state_dict(copy.deepcopy(saved))
    assert other.phase == 1
    assert_equal_states(other.state_dict(), saved)
    # Each group's rate is the schedule's of phase 1 of a rise over 4.
    rates = {group["name"]: group["lr"] for group in other.optimizer.param_groups}
    assert rates == pytest.approx({"base": 0.5 * 1e-2, "head": 0.5 * 2e-2})
    assert advance(others, other, 2) == expected
    assert other.phase == 3
    assert_equal_states(other.state_dict(), state.state_dict())


def test_what_guards_a_run_comes_back_too(tmp_path: Path) -> None:
    setup, state = started(tmp_path, KINDS["full"])
    advance(setup, state, 1)
    state.kl_coef, state.skipped_steps, state.skipped_rewards = 0.1 + 0.2, 3, 2
    state.stopped, state.collapse.up = "phase 1: enough", ["warn/high_kl"]
    _, other = started(tmp_path, KINDS["full"])
    other.load_state_dict(through_a_file(state.state_dict(), tmp_path))
    for name in ("kl_coef", "skipped_steps", "skipped_rewards", "stopped", "collapse"):
        assert getattr(other, name) == getattr(state, name)
    assert len(other.collapse.first_distinct) == 1
    assert_equal_states(other.state_dict(), state.state_dict())


def test_the_state_holds_what_is_trained_and_no_more(tmp_path: Path) -> None:
    sizes = {}
    for kind, reference in KINDS.items():
        setup, state = started(tmp_path, reference)
        advance(setup, state, 1)
        saved = state.state_dict()
        trained = {n for n, p in setup.policy.named_parameters() if p.requires_grad}
        assert saved["policy"].keys() == trained
        # Adam's two moments and its step of each.
        assert len(split_state(saved["optimizer"])[0]) == 3 * len(trained)
        sizes[kind] = len(trained)
    assert sizes["last_layers"] < sizes["full"]


@pytest.mark.parametrize("kind", ["full", "last_layers", "lora"])
def test_another_shape_is_refused_and_nothing_is_changed(kind: str, tmp_path: Path) -> None:
    setup, state = started(tmp_path, KINDS["full"])
    advance(setup, state, 1)
    saved = state.state_dict()
    width = 8 if kind == "full" else 16
    _, other = started(tmp_path, KINDS[kind], d_model=width)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ConfigError, match="the checkpoint is of a model with other trained"):
        other.load_state_dict(saved)
    assert_equal_states(other.state_dict(), before)


def test_each_stream_of_randomness_is_of_the_seed_and_its_own(tmp_path: Path) -> None:
    def draws(seed: int) -> list[list[float]]:
        ppo = ppo_with(total_phases=9, batch_size=6, num_minibatches=2)
        state = ppo_stage.start(ppo, setup, AdamWSettings(), WarmupDecay(), seed, {})
        order = torch.Generator()
        order.set_state(state.prompts.state_dict()["generator"])
        generators = (order, state.sample_generator, state.minibatch_generator)
        return [torch.rand(3, generator=generator).tolist() for generator in generators]

    setup, _ = started(tmp_path, KINDS["full"])
    assert draws(1) == draws(1)
    seen = [*draws(1), *draws(2)]
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_the_best_evaluation_is_known_the_first_of_equals(tmp_path: Path) -> None:
    _, state = started(tmp_path, KINDS["full"])
    seen = []
    for state.phase, score in enumerate((-1.0, -2.0, 0.5, 0.5), start=1):
        seen.append(state.record_evaluation(score))
    assert seen == [True, False, True, False]
    assert (state.best_score, state.best_phase) == (0.5, 3)
    _, other = started(tmp_path, KINDS["full"])
    other.load_state_dict(through_a_file(state.state_dict(), tmp_path))
    assert (other.best_score, other.best_phase) == (0.5, 3)


def test_rates_are_those_that_it_is_built_with(tmp_path: Path) -> None:
    """Also where they have been changed since: a checkpoint knows moments and the phase alone."""
    setup, state = started(tmp_path, KINDS["full"])
    advance(setup, state, 2)
    _, other = start(
        SMALL, tmp_path, task=RAGGED, model=Scratch(num_layers=2, d_model=16, num_heads=2,
        context_len=16), optimizer=AdamWSettings(base_lr=5e-3, head_lr=2e-2, weight_decay=0.1),
        schedule=WarmupDecay(warmup_steps=4),
    )  # fmt: skip
    other.load_state_dict(through_a_file(state.state_dict(), tmp_path))
    rates = {group["name"]: group["lr"] for group in other.optimizer.param_groups}
    assert rates == pytest.approx({"base": 0.75 * 5e-3, "head": 0.75 * 2e-2})
    other.scheduler.step()
    rates = {group["name"]: group["lr"] for group in other.optimizer.param_groups}
    assert rates == pytest.approx({"base": 5e-3, "head": 2e-2})


def test_a_state_goes_on_only_from_the_inputs_that_it_had(tmp_path: Path) -> None:
    _, state = started(tmp_path, KINDS["full"])
    state.inputs = {"task": "a", "model": "b"}
    saved = through_a_file(state.state_dict(), tmp_path)
    assert saved["inputs"] == {"task": "a", "model": "b"}
    state.load_state_dict(saved)
    for field in ("task", "model"):
        inputs = {"task": "a", "model": "b", field: "c"}
        with pytest.raises(ConfigError, match=f"^{field}: the files that it names have changed"):
            state.load_state_dict({**saved, "inputs": inputs})

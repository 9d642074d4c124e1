"""Micro-batches and recomputed activations: less memory, the same training."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from rlhf_exp.rewards.length import Length
from rlhf_exp.rl.learn import Minibatch, add_share, micro_batches
from rlhf_exp.rl.objectives import PolicyGradient, PPOClip, SequenceRatio
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.types import Layout

from ..builders import stretch
from .toy import RAGGED, collect, learn, loss, parts, pass_shape, phase, ppo_with, rows, start
from .toy import context as toy_context

SAMPLER = CachedSampler(gen_len=6, stop_at_eos=True, temperature=2.0)
WHITEN = ("batch", "minibatch", "none")
# Adam divides by the gradient's own size, so that rounding would decide about a step where the
# gradient is 0; with this eps it does not.
SMOOTH = AdamWSettings(base_lr=1e-2, head_lr=1e-2, eps=1e-2)


def started(path: Path, **options: object) -> tuple[PPO, Setup, TrainState]:
    """A policy off its reference, whose completions have lengths of their own."""
    ppo = ppo_with(**{"batch_size": 12, "num_minibatches": 2, **options})
    setup, state = start(
        ppo, path, task=RAGGED, sampler=SAMPLER, reward=Length(target_tokens=3), optimizer=SMOOTH
    )
    stretch(setup.policy.language_model, seed=5)
    return ppo, setup, state


def backward(path: Path, **options: object) -> tuple[list[Tensor], dict[str, float]]:
    """Gradients and metrics of one minibatch, after a phase, so that no ratio is 1."""
    ppo, setup, state = started(path)
    experience = collect(ppo, setup, state)
    list(learn(ppo, setup, state, experience))
    lengths = experience.rollout.completions.mask[:6].sum(dim=1).tolist()
    assert len(set(lengths)) > 2
    state.optimizer.zero_grad()
    micro = ppo_with(batch_size=12, num_minibatches=2, **options)
    minibatch = experience[torch.arange(6)]
    metrics: dict[str, Tensor] = {}
    whole = Minibatch(minibatch, Layout.of(minibatch.rollout.completions))
    aggregation = micro.objective.aggregation
    for part in micro_batches(whole, micro.compute.micro_batch_size, aggregation=aggregation):
        output = loss(micro, setup, part.experience, layout=part.layout)
        (part.share * output.loss).backward()
        metrics = add_share(metrics, output.metrics, part.share)
    gradients = [p.grad.clone() for p in setup.policy.parameters() if p.grad is not None]
    return gradients, {name: value.item() for name, value in metrics.items()}


OBJECTIVES = {
    "tokens": PPOClip(),
    "sequences": PPOClip(aggregation="sequence_mean"),
    "constant": PPOClip(aggregation="constant", clip_coef_high=0.01),
    "gspo": SequenceRatio(),
    "reinforce": PolicyGradient(),
}


@pytest.mark.parametrize("size", [1, 3, 4, 5, 6])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_and_metrics_are_those_of_the_minibatch(
    objective: str, size: int, tmp_path: Path
) -> None:
    options = {"value_clip_coef": 0.1, "objective": OBJECTIVES[objective]}
    whole, metrics = backward(tmp_path, **options)
    micro, micro_metrics = backward(tmp_path, **options, micro_batch_size=size)
    scale = max(gradient.abs().max() for gradient in whole)
    assert scale > 1e-2
    for a, b in zip(whole, micro, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1, scale))
    assert micro_metrics == pytest.approx(metrics, abs=1e-6)
    assert metrics.get("policy/clipfrac", 1) > 0
    assert metrics["loss/kl"] > 1e-3


def passes(path: Path, **options: object) -> tuple[list[int], list[Tensor], list[dict]]:
    """Rows of each forward pass with gradients, weights and metrics after two phases."""
    ppo, setup, state = started(path, **options)
    sizes: list[int] = []

    def note(module: object, args: object, kwargs: dict) -> None:
        if torch.is_grad_enabled():
            sizes.append(pass_shape(kwargs)[0])

    hook = setup.policy.language_model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    metrics = [phase(ppo, setup, state) for _ in range(2)]
    hook.remove()
    return sizes, [p.detach() for p in setup.policy.parameters()], metrics


@pytest.mark.parametrize("whiten", WHITEN)
def test_phases_are_the_same_whatever_fits_into_memory(whiten: str, tmp_path: Path) -> None:
    sizes, weights, metrics = passes(tmp_path, whiten_advantages=whiten)
    assert sizes == [6] * 8
    for size, expected in ((1, [1] * 48), (4, [4, 2] * 8), (6, [6] * 8)):
        seen, micro, micro_metrics = passes(
            tmp_path, whiten_advantages=whiten, micro_batch_size=size
        )
        assert seen == expected
        for a, b in zip(weights, micro, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        for one, other in zip(metrics, micro_metrics, strict=True):
            timeless = {k: v for k, v in one.items() if not k.startswith("time/")}
            assert {k: other[k] for k in timeless} == pytest.approx(timeless, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "constant"])
def test_a_phase_weights_parts_as_its_objective_does(aggregation: str, tmp_path: Path) -> None:
    objective = PPOClip(aggregation=aggregation)
    whole, parted = (
        passes(tmp_path, objective=objective, micro_batch_size=size)[1] for size in (None, 4)
    )
    for a, b in zip(whole, parted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [5, 12])
def test_rollouts_in_parts_learn_the_same(size: int, tmp_path: Path) -> None:
    # Greedy: which numbers are drawn for which row depends on the parts.
    seen = []
    for options in ({}, {"rollout_batch_size": size}):
        ppo, setup, state = started(tmp_path, **options)
        setup = replace(setup, sampler=replace(SAMPLER, top_k=1))
        rows_of: list[tuple[int, int]] = []
        hook = setup.policy.language_model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs, rows=rows_of: rows.append(pass_shape(kwargs)),
            with_kwargs=True,
        )
        metrics = phase(ppo, setup, state)
        hook.remove()
        prefills = [batch for batch, columns in rows_of if columns > 1][: -(-12 // size)]
        weights = torch.cat([p.detach().flatten() for p in setup.policy.parameters()])
        seen.append((metrics["objective/kl"], weights, prefills))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-5)
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=0, atol=1e-5)
    assert seen[1][2] == ([5, 5, 2] if size == 5 else [12])


def test_the_ways_to_whiten_differ(tmp_path: Path) -> None:
    seen = [passes(tmp_path, whiten_advantages=whiten)[1] for whiten in WHITEN]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert max((a - b).abs().max() for a, b in zip(seen[i], seen[j], strict=True)) > 1e-3


def test_a_micro_batch_is_part_of_a_minibatch() -> None:
    message = (
        r"micro_batch_size=7 is above the minibatch of 6 \(batch_size / num_minibatches\): lower it"
    )
    with pytest.raises(ValidationError, match=message):
        ppo_with(batch_size=12, num_minibatches=2, micro_batch_size=7)
    with pytest.raises(ValidationError, match="rollout_batch_size=13 is above batch_size=12"):
        ppo_with(batch_size=12, num_minibatches=2, rollout_batch_size=13)
    fitting = ppo_with(batch_size=12, num_minibatches=2, micro_batch_size=6, rollout_batch_size=12)
    assert fitting.minibatch_size == 6


def test_a_part_of_a_rollout_is_part_of_a_batch() -> None:
    with pytest.raises(ValidationError, match=r"rollout_batch_size=13 is above .*12"):
        ppo_with(batch_size=12, num_minibatches=2, rollout_batch_size=13)
    ppo_with(batch_size=12, num_minibatches=2, rollout_batch_size=12)


def test_recomputed_activations_change_no_run(tmp_path: Path) -> None:
    calls: Counter[str] = Counter()
    hook = register_module_forward_pre_hook(
        lambda module, args: calls.update([name] if type(module).__name__ == "GPT2MLP" else [])
    )
    for name, recomputed in (("a", False), ("b", True)):
        ppo = ppo_with(
            total_phases=2, batch_size=8, num_minibatches=2, eval_samples=8, micro_batch_size=2,
            gradient_checkpointing=recomputed,
        )  # fmt: skip
        ppo.run(toy_context(tmp_path / name), parts(task=RAGGED, sampler=SAMPLER))
    hook.remove()
    # Two phases, each of two passes over four micro-batches, with one more run of the only block.
    assert calls["b"] - calls["a"] == 2 * 2 * 4
    kept, recomputed = (
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(tmp_path / n)]
        for n in "ab"
    )
    assert kept == recomputed
    one, other = ((tmp_path / n / "model" / "model.safetensors").read_bytes() for n in "ab")
    assert one == other

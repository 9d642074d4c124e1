"""Averaged weights: what is averaged, where it is used, and that training does not see it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_exp.models.finetune import LastLayers, Lora
from rlhf_exp.models.loading import load_policy
from rlhf_exp.rl.averaging import WeightAverage
from rlhf_exp.training.optim import trained_state

from ..stages.test_resume import Failing, assert_resume_is_exact
from .toy import RAGGED, context, parts, phase, ppo_with, rows, start

PPO = ppo_with(
    total_phases=4, batch_size=8, eval_every=2, eval_samples=6, checkpoint_every=1,
    average_weights=0.5, dtype="fp32",
)  # fmt: skip


def weights(policy: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained_state(policy).items()}


def test_the_average_is_exponential(tmp_path: Path) -> None:
    setup, state = start(PPO, tmp_path, task=RAGGED)
    expected = weights(setup.policy)
    for _ in range(3):
        phase(PPO, setup, state)
        now = weights(setup.policy)
        expected = {name: 0.5 * expected[name] + 0.5 * now[name] for name in now}
    assert state.average is not None
    assert_close(state.average.weights, expected)
    with state.evaluated_weights():
        assert_close(weights(setup.policy), expected)
    assert_close(weights(setup.policy), now, rtol=0, atol=0)


def test_after_an_error_the_policy_has_its_own_weights(tmp_path: Path) -> None:
    setup, state = start(PPO, tmp_path, task=RAGGED)
    phase(PPO, setup, state)
    before = weights(setup.policy)
    with pytest.raises(RuntimeError), state.evaluated_weights():
        raise RuntimeError
    assert_close(weights(setup.policy), before, rtol=0, atol=0)


@pytest.mark.parametrize("finetune", [LastLayers(num_layers_unfrozen=1), Lora(rank=2)])
def test_only_what_is_trained_is_copied(tmp_path: Path, finetune: Any) -> None:
    setup, _ = start(PPO, tmp_path, task=RAGGED, finetune=finetune)
    average = WeightAverage(setup.policy, 0.9)
    assert {*average.weights} == {*trained_state(setup.policy)}
    assert len(average.weights) < len([*setup.policy.parameters()])


@pytest.mark.usefixtures("unchecked")
def test_evaluations_and_the_saved_model_have_the_average_and_training_does_not(
    tmp_path: Path,
) -> None:
    for name, decay in (("averaged", 0.5), ("plain", None)):
        ppo = replace(PPO, average_weights=decay)
        ppo.run(context(tmp_path / name), parts(task=RAGGED, reward=Failing()))
    averaged, plain = (rows(tmp_path / name) for name in ("averaged", "plain"))
    for row, other in zip(averaged, plain, strict=True):
        if "eval/kl" in row:
            assert row["eval/kl"] < other["eval/kl"] or row["phase"] == 0
        else:
            assert row["objective/kl"] == other["objective/kl"]
    saved, trained = (load_policy(tmp_path / name / "model") for name in ("averaged", "plain"))
    setup, _ = start(PPO, tmp_path / "base", task=RAGGED)
    tokens = torch.tensor([[4, 5, 6]])
    first, last, between = (p(tokens)[0] for p in (setup.policy, trained, saved))
    assert 0.2 < ((between - first).norm() / (last - first).norm()).item() < 0.9


@pytest.mark.usefixtures("unchecked")
def test_a_run_goes_on_with_its_average(tmp_path: Path) -> None:
    assert_resume_is_exact(tmp_path, PPO, at=4)


def test_a_run_that_had_none_begins_one_at_its_weights(tmp_path: Path) -> None:
    plain = replace(PPO, average_weights=None)
    setup, state = start(plain, tmp_path, task=RAGGED)
    phase(plain, setup, state)
    expected = weights(setup.policy)
    resumed_setup, resumed = start(PPO, tmp_path, task=RAGGED)
    resumed.load_state_dict(state.state_dict())
    assert resumed.average is not None
    assert_close(resumed.average.weights, expected, rtol=0, atol=0)
    phase(PPO, resumed_setup, resumed)
    now = weights(resumed_setup.policy)
    expected = {name: 0.5 * expected[name] + 0.5 * now[name] for name in now}
    assert_close(resumed.average.weights, expected)

"""Where values come from: the policy's hidden states, those without a gradient, or a copy's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf_exp.rl.estimators import LeaveOneOut
from rlhf_exp.rl.phases import sampled_values
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.types import Layout
from tests.app.test_run import TINY, assert_refused, train

from ..stages.test_resume import assert_resume_is_exact
from .fixed import fixed_completions, fixed_experience
from .toy import RAGGED, loss, phase, ppo_with, start

SMALL: dict[str, Any] = {"batch_size": 8, "num_minibatches": 2, "dtype": "fp32"}


def gradients(path: Path, **options: Any) -> dict[str, Tensor]:
    """Each parameter's gradient of one loss, with the same samples and advantages."""
    shared = ppo_with(**SMALL)
    setup, _ = start(shared, path, task=RAGGED)
    experience = fixed_experience(shared, setup, fixed_completions(setup))
    ppo = ppo_with(**{**SMALL, "vf_coef": 0.5, **options})
    setup, _ = start(ppo, path, task=RAGGED)
    if ppo.value_model == "separate":
        policy, layout = setup.policy, Layout.of(experience.rollout.completions)
        value = policy.completion_values(experience.rollout.completions, layout)
        policy_pass = policy.engine.learning_pass(
            experience.rollout, setup.reference.head, layout, temperature=1.0
        )
        assert policy_pass.values is None
        new = policy_pass._replace(values=value)
        ppo.objective(new, experience, ppo.coefficients(ppo.kl_coef)).loss.backward()
    else:
        loss(ppo, setup, experience).loss.backward()
    return {n: p.grad for n, p in setup.policy.named_parameters() if p.grad is not None}


def of_model(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad for name, grad in found.items() if name.startswith("language_model")}


@pytest.mark.parametrize("options", [{"value_detach": True}, {"value_model": "separate"}])
def test_the_value_loss_does_not_reach_the_policy(options: dict[str, Any], tmp_path: Path) -> None:
    found, shared = gradients(tmp_path, **options), gradients(tmp_path)
    without = gradients(tmp_path, vf_coef=0.0)
    for name, expected in of_model(without).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)
    assert any((of_model(shared)[n] - g).abs().max() > 1e-4 for n, g in of_model(without).items())
    # The value head learns as it does on shared hidden states.
    for name in ("value_head.0.weight", "value_head.2.weight"):
        torch.testing.assert_close(found[name], shared[name], rtol=1e-4, atol=1e-6)


def test_a_separate_trunk_has_the_gradient_of_the_values_alone(tmp_path: Path) -> None:
    found, shared = gradients(tmp_path, value_model="separate"), gradients(tmp_path)
    without = gradients(tmp_path, vf_coef=0.0)
    for name, grad in of_model(found).items():
        trunk = found.get(f"value_trunk.{name}")
        if trunk is None:
            continue
        expected = shared[name] - without[name]
        if "wte" not in name:  # tied: the policy's own also has the gradient of the logits
            torch.testing.assert_close(trunk, expected, rtol=1e-3, atol=1e-5)
        assert grad.shape == trunk.shape


def test_a_separate_trunk_begins_with_the_shared_values_and_learns(tmp_path: Path) -> None:
    ppo = ppo_with(value_model="separate", **SMALL)
    setup, state = start(ppo, tmp_path, task=RAGGED, sampler=CachedSampler(gen_len=5))
    policy = setup.policy
    rollout = fixed_experience(
        ppo_with(**SMALL), start(ppo_with(**SMALL), tmp_path, task=RAGGED)[0],
        fixed_completions(setup),
    ).rollout  # fmt: skip
    values = sampled_values(policy, rollout, rows=3)
    hidden = policy.completion_states(rollout.completions, Layout.of(rollout.completions))
    expected = policy.value_head(hidden).squeeze(-1)
    mask = rollout.completions.mask[:, : hidden.shape[1]]
    torch.testing.assert_close(values[:, : hidden.shape[1]][mask], expected[mask])
    before = {n: p.clone() for n, p in policy.named_parameters()}
    metrics = phase(ppo, setup, state)
    assert metrics["loss/value"] > 0
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("value_trunk") for n in moved)
    assert any(n.startswith("language_model") for n in moved)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("options", [{"value_detach": True}, {"value_model": "separate"}])
def test_a_run_resumes_bit_by_bit(options: dict[str, Any], tmp_path: Path) -> None:
    ppo = ppo_with(
        total_phases=4, batch_size=8, num_minibatches=2, eval_samples=4, checkpoint_every=1,
        **options,
    )  # fmt: skip
    assert_resume_is_exact(tmp_path, ppo, at=3)
    saved = (tmp_path / "cut" / "model" / "value_head.safetensors").is_file()
    assert saved == ("value_detach" in options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_model": "separate"}, "value_model=separate: LeaveOneOut has no values; set it sh"),
        ({"value_detach": True}, "value_detach=true: LeaveOneOut has no values; set it false"),
    ],
)
def test_without_values_there_is_nothing_to_choose(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ppo_with(estimator=LeaveOneOut(), samples_per_prompt=4, **options)
    with pytest.raises(ValidationError, match="leaves no shared weights; set it false"):
        PPO(value_model="separate", value_detach=True)


def test_a_separate_trunk_needs_the_fast_engine(tmp_path: Path) -> None:
    words = ("stage.value_model=separate", "model.engine=hooked")
    outcome = train(tmp_path, *TINY, *words, "--dry-run")
    assert_refused(outcome, r"stage\.value_model=separate needs model\.engine=fast")

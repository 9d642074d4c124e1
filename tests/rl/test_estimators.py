"""Estimators: leave-one-out without values, prompt groups, and one from outside of the package."""

import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.functional.advantages import leave_one_out
from rlhf_exp.models.loading import load_policy
from rlhf_exp.rl.estimators import Estimator, LeaveOneOut
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.checkpoint import read_newest_checkpoint
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import settings
from rlhf_exp.types import Rollout, concatenate
from tests.app.test_run import train

from ..stages.test_resume import Failing, timeless
from .toy import RAGGED, collect, context, parts, phase, ppo_with, rows, start

LOO = {"estimator": LeaveOneOut(), "samples_per_prompt": 4}


def test_samples_of_a_prompt_are_a_group(tmp_path: Path) -> None:
    ppo = ppo_with(batch_size=12, **LOO)
    setup, state = start(ppo, tmp_path, task=RAGGED)
    rollout = collect(ppo, setup, state).rollout
    assert rollout.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    prompts = rollout.completions.prompts.texts
    assert [prompts[i] for i in (0, 4, 8)] == list(prompts[::4])
    assert all(prompts[i] == prompts[4 * (i // 4)] for i in range(12))
    assert len({*prompts}) == 3
    # In parts and minibatches each row keeps its group.
    halves = [rollout[torch.arange(7)], rollout[torch.arange(7, 12)]]
    assert concatenate(halves).groups.tolist() == rollout.groups.tolist()
    assert rollout[torch.tensor([9, 1])].groups.tolist() == [2, 0]


def test_without_samples_per_prompt_each_row_is_its_own_group(tmp_path: Path) -> None:
    ppo = ppo_with(batch_size=8)
    setup, state = start(ppo, tmp_path, task=RAGGED)
    assert collect(ppo, setup, state).rollout.groups.tolist() == list(range(8))


@pytest.mark.parametrize("kl_penalty", ["loss", "reward"])
def test_leave_one_out_gives_each_token_its_completions_advantage(
    tmp_path: Path, kl_penalty: str
) -> None:
    ppo = ppo_with(batch_size=12, kl_penalty=kl_penalty, normalize_reward=False, **LOO)
    sampler = CachedSampler(gen_len=5, stop_at_eos=True, temperature=2.0)
    setup, state = start(ppo, tmp_path, task=RAGGED, sampler=sampler)
    phase(ppo, setup, state)  # away from the reference
    experience = collect(ppo, setup, state)
    rollout, mask = experience.rollout, experience.rollout.completions.mask
    assert not mask.all()
    charge = 0.2 * (rollout.logprobs - rollout.ref_logprobs).sum(dim=1)
    totals = rollout.scores - (charge if kl_penalty == "reward" else 0)
    for i in range(12):
        others = [j for j in range(4 * (i // 4), 4 * (i // 4) + 4) if j != i]
        expected = totals[i] - sum(totals[j] for j in others) / 3
        for t in range(5):
            value = expected if mask[i, t] else torch.tensor(0.0)
            torch.testing.assert_close(experience.advantages[i, t], value, rtol=0, atol=1e-6)
    assert experience.returns is None


def test_without_values_there_is_no_head_anywhere(tmp_path: Path) -> None:
    ppo = ppo_with(
        total_phases=2, batch_size=8, num_minibatches=2, eval_samples=4, checkpoint_every=1, **LOO
    )
    setup, state = start(ppo, tmp_path / "other", task=RAGGED)
    assert setup.policy.value_head is None
    assert not any("value_head" in name for name in setup.policy.state_dict())
    assert not any("value_head" in name for name in state.state_dict()["policy"])
    assert [group["name"] for group in state.optimizer.param_groups] == ["base", "base"]

    ppo.run(context(tmp_path / "run"), parts(task=RAGGED))
    for row in rows(tmp_path / "run"):
        of_values = {"loss/value", "grad_norm/head", "lr/head", "warn/bad_values"}
        assert not of_values & row.keys()
        assert not any(name.startswith("val/") for name in row)
    assert not (tmp_path / "run" / "model" / "value_head.safetensors").exists()
    assert load_policy(tmp_path / "run").value_head is not None  # a new one
    ppo_with(total_phases=2, batch_size=8, num_minibatches=2, eval_samples=4).run(
        context(tmp_path / "gae"), parts(task=RAGGED)
    )
    with_values = {name for row in rows(tmp_path / "gae") for name in row}
    assert of_values - {"warn/bad_values"} < with_values
    assert any(name.startswith("val/") for name in with_values)


@pytest.mark.usefixtures("unchecked")
def test_a_run_without_values_resumes_bit_by_bit(tmp_path: Path) -> None:
    ppo = ppo_with(
        total_phases=4, batch_size=8, num_minibatches=2, eval_samples=4, eval_every=9,
        checkpoint_every=1, async_reward=True, **LOO,
    )  # fmt: skip

    def run(folder: str, *, resume: bool = False, at: int | None = None) -> None:
        given = parts(task=RAGGED, reward=Failing(at=at))
        ppo.run(context(tmp_path / folder, resume=resume), given)

    run("whole")
    with pytest.raises(KeyboardInterrupt):  # at the batch of phase 4, sampled in phase 3
        run("cut", at=5)
    newest = read_newest_checkpoint(tmp_path / "cut")
    assert newest is not None
    # The batch ahead, of phase 3, keeps its groups and has no values.
    assert "state/ahead/prompts/groups" in newest.tensors
    assert "state/ahead/rollout/values" not in newest.tensors
    run("cut", resume=True)
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    weights = [
        (tmp_path / name / "model/model.safetensors").read_bytes() for name in ("cut", "whole")
    ]
    assert weights[0] == weights[1]


@pytest.mark.usefixtures("unchecked")
def test_leave_one_out_solves_the_bandit(tmp_path: Path) -> None:
    ppo = ppo_with(total_phases=12, kl_coef=0.0, eval_every=12, **LOO)
    result = ppo.run(context(tmp_path), parts(sampler=CachedSampler(gen_len=1)))
    assert result.after["eval/score"] > 0.9 > 0.3 > result.before["eval/score"]


def test_an_estimator_returns_what_it_says(tmp_path: Path) -> None:
    @settings
    class Nothing(Estimator):
        def __call__(self, rollout: Rollout, rewards: torch.Tensor) -> None:
            return None

    @settings
    class NoReturns(LeaveOneOut):
        needs_values = True

    for estimator, returns in ((Nothing(), "returns=None"), (NoReturns(), "returns")):
        ppo = ppo_with(total_phases=1, batch_size=8, num_minibatches=2, estimator=estimator,
                       samples_per_prompt=2)  # fmt: skip
        name = type(estimator).__name__
        with pytest.raises(
            TrainingError, match=f"^{name} has .* return an Experience with {returns}"
        ):
            ppo.run(context(tmp_path / name), parts(task=RAGGED))


def test_leave_one_out_has_no_values_to_clip() -> None:
    with pytest.raises(ValidationError, match=r"value_clip_coef=0\.2: LeaveOneOut has no values"):
        ppo_with(value_clip_coef=0.2, **LOO)


def test_leave_one_out_needs_two_samples() -> None:
    with pytest.raises(ValidationError, match=r"samples_per_prompt=1: LeaveOneOut needs at least"):
        ppo_with(estimator=LeaveOneOut())
    with pytest.raises(ValidationError, match=r"batch_size=32 must be a multiple of samples_per"):
        ppo_with(samples_per_prompt=5)
    with pytest.raises(ValueError, match="at least two samples of each prompt"):
        leave_one_out(torch.ones(3), torch.tensor([0, 0, 1]))


OUTSIDE = """
from typing import ClassVar

from rlhf_exp.rl.estimators import Estimator
from rlhf_exp.rl.objectives import Objective, regularized
from rlhf_exp.functional.masking import masked_mean
from rlhf_exp.settings import Positive, settings
from rlhf_exp.types import Experience


@settings
class BatchMean(Estimator):
    scale: Positive = 1.0

    def __call__(self, rollout, rewards):
        totals = rewards.sum(dim=1, keepdim=True)
        mask = rollout.completions.mask
        advantages = self.scale * (totals - totals.mean()) * mask
        return Experience(rollout=rollout, rewards=rewards, advantages=advantages, returns=None)


@settings
class PolicyGradient(Objective):
    extra_metrics: ClassVar[tuple[str, ...]] = ("policy/logprob",)

    def __call__(self, new, batch, coefs):
        mask = batch.rollout.completions.mask
        term = masked_mean(new.logprobs * batch.advantages, mask)
        own = {"policy/logprob": masked_mean(new.logprobs, mask).detach()}
        return regularized(term, new, batch, coefs, own)
"""

GROUPS = {"estimator": "BatchMean", "objective": "PolicyGradient"}


@pytest.mark.parametrize(
    "own",
    [
        pytest.param("estimator", marks=pytest.mark.soak),
        pytest.param("objective", marks=pytest.mark.soak),
        "both",
    ],
)
def test_an_estimator_and_an_objective_from_outside_train_a_bandit(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    options = tmp_path / "options" / "stage"
    for group, target in GROUPS.items():
        (options / group).mkdir(parents=True)
        (options / group / "mine.yaml").write_text(f"_target_: outside.{target}\n")
    words = [f"stage/{group}=mine" for group in GROUPS if own in (group, "both")]
    if own != "objective":
        words.append("+stage.estimator.scale=2")
    outcome = train(
        tmp_path, "~experiment", *words, "allow_targets=[outside]",
        f"hydra.searchpath=[file://{options.parent}]",
        "model=tiny", "task=reviews", "reward=char_count", "reward.character=e", "logger=local",
        "sampler.gen_len=1", "stage.kl_coef=0", "stage.ent_coef=0", "stage.total_phases=12",
        "stage.eval_samples=64", "stage.eval_every=12", "optimizer.base_lr=1e-2",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    scores = [row["eval/score"] for row in rows(tmp_path / "run") if "eval/score" in row]
    assert scores[-1] > scores[0] + 1
    last = rows(tmp_path / "run")[-2]
    assert ("loss/value" in last) == (own == "objective")
    assert ("policy/logprob" in last) == ("policy/clipfrac" not in last) == (own != "estimator")


def test_what_is_not_allowed_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "untrusted.py").write_text(OUTSIDE)
    outcome = train(tmp_path, "stage.estimator._target_=untrusted.BatchMean", "--dry-run")
    assert outcome.code == 2
    assert "stage.estimator._target_=untrusted.BatchMean is outside of" in outcome.out + outcome.err
    assert "untrusted" not in sys.modules

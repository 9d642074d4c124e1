"""Steps that are not taken: of gradients that are not finite, and too far from the policy that
sampled. And the KL's coefficient, where it adapts."""

import copy
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.rl.histograms import HistogramCollector
from rlhf_exp.rl.metrics import mean_over_steps
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.checkpoint import read_newest_checkpoint
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import settings
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.training.saver import split_state
from rlhf_exp.training.schedules import WarmupDecay
from rlhf_exp.types import Completions

from .toy import (
    RAGGED,
    collect,
    context,
    experience_of,
    learn,
    loss,
    parts,
    phase,
    ppo_with,
    rows,
    start,
)


def ppo_of(**options: object) -> PPO:
    small = {"batch_size": 8, "num_minibatches": 2, "batches_per_learning_phase": 1}
    return ppo_with(**{**small, "dtype": "fp32", **options})


@settings
class Constant:
    """The same score for every completion."""

    def load(self, device: torch.device) -> RewardFunction:
        return lambda completions: torch.full((len(completions.texts),), 0.5, device=device)


@settings
class OneOfFour:
    """1 for every fourth completion, 0 for the others."""

    def load(self, device: torch.device) -> RewardFunction:
        def score(completions: Completions) -> Tensor:
            return (torch.arange(len(completions.texts), device=device) % 4 == 0).float()

        return score


def spoil(setup: Setup, value: float, *steps: int) -> None:
    """Has the gradient of those backward passes, counted from 1, hold the value."""
    calls = iter(range(1, 1000))

    def put(gradient: Tensor) -> Tensor | None:
        return torch.full_like(gradient, value) if next(calls) in steps else None

    setup.policy.value_head[0].bias.register_hook(put)


def weights(state: TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in state.policy.parameters()])


def learned(state: TrainState) -> dict[str, Tensor]:
    """Weights, Adam's moments and its count of steps."""
    saved = state.state_dict()
    parts = {name: saved[name] for name in ("policy", "optimizer")}
    return copy.deepcopy(split_state(parts)[0])


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_its_step(tmp_path: Path, value: float) -> None:
    ppo = ppo_of()
    setup, state = start(ppo, tmp_path, task=RAGGED)
    spoil(setup, value, 2)
    experience = collect(ppo, setup, state)
    steps = learn(ppo, setup, state, experience)
    first = next(steps)
    after_one = learned(state)
    second = next(steps)
    assert (first["policy/steps"], second["policy/steps"]) == (1, 0)
    assert equal(learned(state), after_one)
    assert list(steps) == []
    assert first["loss/total"].isfinite()
    assert second["loss/total"].isfinite()

    setup, state = start(ppo, tmp_path, task=RAGGED)
    spoil(setup, value, 2)
    message = (
        r"^phase 1, step 2: the gradient is not finite \(loss/total .*grad_norm/head (nan|inf)"
    )
    with pytest.raises(TrainingError, match=message):
        phase(ppo, setup, state)
    assert weights(state).isfinite().all()


def test_a_skipped_step_changes_neither_weights_nor_moments(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ppo = ppo_of(on_nonfinite="skip")
    setup, state = start(ppo, tmp_path, task=RAGGED)
    phase(ppo, setup, state)
    before = learned(state)
    spoil(setup, math.nan, 1, 2)
    row = phase(ppo, setup, state)
    assert equal(learned(state), before)
    assert (row["policy/steps"], row["train/skipped_steps"], state.skipped_steps) == (0, 2, 2)
    for name in ("loss/total", "policy/approxkl", "grad_norm/base", "grad_norm/head"):
        assert math.isnan(row[name])
    assert math.isfinite(row["objective/scores"])
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert sum(text.startswith("phase 2, step") for text in told) == 2
    assert "phase 2, step 1 is skipped: the gradient is not finite" in told[0]
    after = phase(ppo, setup, state)
    assert (after["policy/steps"], after["train/skipped_steps"]) == (2, 2)
    assert math.isfinite(after["loss/total"])
    assert after.keys() == row.keys()
    assert not equal(learned(state), before)


def test_means_leave_skipped_steps_out(tmp_path: Path) -> None:
    ppo = ppo_of(on_nonfinite="skip")
    setup, state = start(ppo, tmp_path, task=RAGGED)
    experience = collect(ppo, setup, state)
    twin = copy.deepcopy(state.policy)
    order = torch.Generator()
    order.set_state(state.minibatch_generator.get_state())
    index = torch.randperm(8, generator=order)
    spoil(setup, math.inf, 1)
    minibatches = [*learn(ppo, setup, state, experience)]
    numbers = [{k: v.item() for k, v in m.items()} for m in minibatches]
    summed = mean_over_steps(ppo.guards, state, numbers, ())
    # The second minibatch met the policy as it was at first.
    expected = loss(ppo, setup, experience[index[4:]], policy=twin).loss.item()
    assert summed["loss/total"] == pytest.approx(expected, abs=1e-6)
    assert (summed["policy/steps"], state.skipped_steps) == (1, 1)


def test_so_many_are_skipped_and_no_more(tmp_path: Path) -> None:
    ppo = ppo_of(on_nonfinite="skip", max_skipped=3)
    setup, state = start(ppo, tmp_path, task=RAGGED)
    spoil(setup, math.nan, 1, 4, 5, 8)
    state.skipped_rewards = 1
    assert phase(ppo, setup, state)["train/skipped_steps"] == 1
    assert phase(ppo, setup, state)["train/skipped_steps"] == 2
    message = (
        r"^phase 3: 3 steps .* and 1 phases without scores .* than stage\.guards\.max_skipped=3"
    )
    with pytest.raises(TrainingError, match=message):
        phase(ppo, setup, state)


def test_nothing_changes_where_all_is_finite(tmp_path: Path) -> None:
    seen = []
    for options in ({}, {"on_nonfinite": "skip"}, {"max_approx_kl": 1e9}):
        ppo = ppo_of(**options)
        setup, state = start(ppo, tmp_path, task=RAGGED)
        metrics = [phase(ppo, setup, state) for _ in range(2)]
        assert [row["policy/steps"] for row in metrics] == [2, 2]
        seen.append(learned(state))
    assert equal(seen[0], seen[1])
    assert equal(seen[0], seen[2])


def test_learning_ends_before_the_step_that_is_too_far(tmp_path: Path) -> None:
    seen = []
    for passes, target in ((1, None), (3, 1e-8), (3, None)):
        ppo = ppo_of(num_minibatches=1, batches_per_learning_phase=passes, max_approx_kl=target)
        setup, state = start(ppo, tmp_path, task=RAGGED)
        row = phase(ppo, setup, state)
        seen.append((learned(state), row["policy/steps"], row["policy/approxkl"]))
    assert [steps for _, steps, _ in seen] == [1, 1, 3]
    assert equal(seen[0][0], seen[1][0])
    assert not equal(seen[0][0], seen[2][0])
    assert seen[0][2] == seen[1][2] < 1e-8 < seen[2][2]  # the mean is over steps taken


def test_histograms_are_of_the_pass_that_was_ended(tmp_path: Path) -> None:
    ppo = ppo_of(batches_per_learning_phase=3, max_approx_kl=1e-8)
    setup, state = start(ppo, tmp_path)
    seen = HistogramCollector()
    seen.start(active=True)
    experience = collect(ppo, setup, state)
    steps = [*learn(ppo, setup, state, experience, seen)]
    assert [step["policy/steps"] for step in steps] == [1, 0]
    assert sum(seen.histograms()["ratio"].counts) == 8 * 4
    assert HistogramCollector().histograms() == {}


def test_the_coefficient_follows_the_kl_of_each_phase(tmp_path: Path) -> None:
    ppo = ppo_with(
        total_phases=5, batch_size=8, num_minibatches=1, eval_every=9, eval_samples=4,
        kl_coef=0.2, adaptive_kl_target=0.02, kl_horizon=20, checkpoint_every=1,
    )  # fmt: skip
    ppo.run(context(tmp_path), parts(task=RAGGED))
    logged = [row for row in rows(tmp_path) if "objective/kl_coef" in row]
    expected, coefs = 0.2, []
    for row in logged:
        coefs.append(expected)
        error = min(max(row["objective/kl_sum"] / 0.02 - 1, -0.2), 0.2)
        expected *= 1 + error * 8 / 20
    assert [row["objective/kl_coef"] for row in logged] == pytest.approx(coefs, rel=1e-12)
    assert coefs[1] == pytest.approx(0.2 * (1 - 0.2 * 8 / 20))  # phase 1 has no KL yet
    assert coefs[-1] > min(coefs)
    newest = read_newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.numbers["state"]["loop"]["kl_coef"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kl_penalty", ["loss", "reward"])
def test_the_coefficient_of_the_state_is_what_is_learned_with(
    tmp_path: Path, kl_penalty: str
) -> None:
    seen = {}
    for name, kl_coef, of_state in (
        ("own", 0.9, None),
        ("adapted", 0.1, 0.9),
        ("other", 0.1, None),
    ):
        ppo = ppo_of(kl_coef=kl_coef, kl_penalty=kl_penalty, normalize_reward=False)
        setup, state = start(ppo, tmp_path, task=RAGGED)
        phase(ppo_of(kl_coef=0.0), setup, state)  # away from the reference
        state.kl_coef = of_state
        assert phase(ppo, setup, state)["objective/kl_coef"] == (of_state or kl_coef)
        seen[name] = learned(state)
    assert equal(seen["own"], seen["adapted"])
    assert not equal(seen["own"], seen["other"])


def test_a_coefficient_that_could_not_adapt_is_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"adaptive_kl_target=6 scales kl_coef, and kl_coef=0"
    ):
        ppo_with(adaptive_kl_target=6.0, kl_coef=0.0)
    with pytest.raises(ValidationError, match=r"kl_horizon=50 must be above 0\.2 x batch_size=256"):
        ppo_with(adaptive_kl_target=6.0, kl_horizon=50.0, batch_size=256)
    ppo_with(adaptive_kl_target=None, kl_coef=0.0)
    ppo_with(adaptive_kl_target=6.0, kl_horizon=52.0, batch_size=256)


@pytest.mark.parametrize("budget", [0.03, None])
def test_a_run_ends_where_its_kl_is_spent(
    tmp_path: Path, budget: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ppo = ppo_with(
        total_phases=6, batch_size=8, num_minibatches=1, eval_every=5, eval_samples=4,
        max_kl_sum=budget, kl_coef=0.0, checkpoint_every=5,
    )  # fmt: skip
    given = parts(task=RAGGED, schedule=WarmupDecay(warmup_steps=1))
    result = ppo.run(context(tmp_path), given)
    logged = [row for row in rows(tmp_path) if "objective/kl_sum" in row]
    if budget is None:
        assert result.extra["stopped"] is None
        assert len(logged) == 6
        return
    sums = [row["objective/kl_sum"] for row in logged]
    assert len(sums) < 5
    assert max(sums[:-1]) <= budget < sums[-1]
    assert result.extra["stopped"].startswith(
        f"phase {len(sums)}: objective/kl_sum is {sums[-1]:.4g} "
    )
    assert f"{result.extra['stopped']}: the run ends" in caplog.messages
    assert [row["phase"] for row in rows(tmp_path) if "eval/score" in row] == [0, len(sums)]
    assert (tmp_path / "model" / "model.safetensors").is_file()
    # And it stays ended.
    before = rows(tmp_path)
    again = ppo.run(context(tmp_path, resume=True), given)
    assert again.extra["stopped"] == result.extra["stopped"]
    assert rows(tmp_path) == before


ALONE = {"vf_coef": 0.0, "ent_coef": 0.0, "kl_coef": 0.0}  # nothing but the policy's term


@pytest.mark.parametrize("whiten", ["batch", "minibatch", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_scores_move_no_policy(tmp_path: Path, whiten: str, normalize: bool) -> None:
    ppo = ppo_of(whiten_advantages=whiten, normalize_reward=normalize, **ALONE)
    setup, state = start(ppo, tmp_path, task=RAGGED, reward=Constant())
    before = weights(state)
    row = phase(ppo, setup, state)
    assert torch.equal(weights(state), before)
    assert (row["loss/policy"], row["warn/equal_scores"], row["policy/steps"]) == (0, 1, 2)


def test_values_learn_from_equal_scores(tmp_path: Path) -> None:
    ppo = ppo_of(normalize_reward=False, vf_coef=1.0)
    setup, state = start(ppo, tmp_path, task=RAGGED, reward=Constant())
    losses = [phase(ppo, setup, state)["loss/value"] for _ in range(12)]
    assert losses[-1] < losses[0] / 2


def test_a_reward_that_says_nothing_leaves_the_policy_at_the_reference(tmp_path: Path) -> None:
    # The error of the values, whitened, drove it .1 nats a completion away.
    ppo = ppo_of(batch_size=16, batches_per_learning_phase=2)
    setup, state = start(ppo, tmp_path, task=RAGGED, reward=Constant())
    rows = [phase(ppo, setup, state) for _ in range(10)]
    assert rows[-1]["objective/kl_sum"] < 0.01


@pytest.mark.parametrize("whiten", ["batch", "minibatch"])
def test_kl_in_the_reward_is_a_signal_where_scores_are_equal(tmp_path: Path, whiten: str) -> None:
    charged = ppo_of(kl_penalty="reward", normalize_reward=False, whiten_advantages=whiten)
    free = replace(charged, kl_coef=0.0)
    setup, state = start(charged, tmp_path, task=RAGGED, reward=Constant())
    phase(ppo_of(), setup, state)  # away from the reference, by the entropy and the values
    rollout = collect(charged, setup, state).rollout
    assert experience_of(charged, rollout).advantages.any()
    assert not experience_of(free, rollout).advantages.any()


@pytest.mark.parametrize("penalty", [None, 1.0])
def test_a_penalty_for_a_missing_eos_is_a_signal(tmp_path: Path, penalty: float | None) -> None:
    ppo = ppo_of(batch_size=32, missing_eos_penalty=penalty, **ALONE)
    sampler = CachedSampler(gen_len=4, stop_at_eos=True)
    setup, state = start(ppo, tmp_path, task=RAGGED, reward=Constant(), sampler=sampler)
    row = phase(ppo, setup, state)
    assert (row["warn/equal_scores"] == 0) is (row["grad_norm/base"] > 0) is (penalty is not None)


def test_a_whitened_minibatch_with_equal_scores_moves_no_policy(tmp_path: Path) -> None:
    ppo = ppo_of(num_minibatches=4, whiten_advantages="minibatch", **ALONE)
    setup, state = start(ppo, tmp_path, task=RAGGED, reward=OneOfFour())
    experience = collect(ppo, setup, state)
    order = torch.Generator()
    order.set_state(state.minibatch_generator.get_state())
    pairs = torch.randperm(8, generator=order).split(2)
    differ = [bool((a % 4 == 0) != (b % 4 == 0)) for a, b in pairs]
    steps = learn(ppo, setup, state, experience)
    assert [bool(step["grad_norm/base"] > 0) for step in steps] == differ
    assert 0 < sum(differ) < 4

"""Runs whose reward fails, once or always, in a phase or in an evaluation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import settings
from rlhf_exp.stages.protocol import StageResult
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import WarmupDecay
from rlhf_exp.types import Completions

from ..stages.test_resume import files, timeless
from .toy import RAGGED, context, parts, phase, ppo_with, rows, start

SMALL: dict[str, Any] = {
    "total_phases": 4, "batch_size": 9, "num_minibatches": 3, "eval_samples": 6, "eval_every": 2,
    "reward_retry_wait_s": 0.0, "dtype": "fp32", "histograms_every": 3,
}  # fmt: skip
ASYNC = {"async_reward": True, "checkpoint_every": None}
# The calls: an evaluation, phases 1 and 2, an evaluation, phases 3 and 4, an evaluation.
PHASE_3 = 5


@settings
class Faulty:
    """Counts low words. At the calls of those numbers, counted from 1, it gives NaN or raises."""

    at: tuple[int, ...] = ()
    raises: bool = True

    def load(self, device: torch.device) -> RewardFunction:
        calls = iter(range(1, 1000))

        def score(completions: Completions) -> Tensor:
            texts = [text.split() for text in completions.texts]
            scores = torch.tensor([float(sum(word < "w6" for word in words)) for words in texts])
            if next(calls) in self.at:
                if self.raises:
                    raise ConnectionError("the judge is gone")
                scores[1] = math.nan
            return scores

        return score


def run(path: Path, *at: int, raises: bool = True, **options: Any) -> StageResult:
    given = {
        "task": RAGGED,
        "reward": Faulty(at=at, raises=raises),
        "sampler": CachedSampler(gen_len=4, stop_at_eos=True),
        "schedule": WarmupDecay(warmup_steps=2),
        "optimizer": AdamWSettings(base_lr=1e-2, head_lr=1e-2),
    }
    return ppo_with(**{**SMALL, **options}).run(context(path), parts(**given))


@pytest.mark.parametrize("options", [{}, {"reward_timeout_s": None}, ASYNC], ids=str)
def test_a_fault_that_passes_changes_no_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    run(tmp_path / "clean", **options)
    faults = (1, PHASE_3 + 1, PHASE_3 + 2)  # the first asks for the evaluation again
    run(tmp_path / "faulty", *faults, on_reward_error="retry", raises=False, **options)
    assert timeless(tmp_path / "faulty") == timeless(tmp_path / "clean")
    assert files(tmp_path / "faulty") == files(tmp_path / "clean")


@pytest.mark.parametrize("policy", ["stop", "retry"])
def test_a_fault_that_stays_ends_the_run(tmp_path: Path, policy: str) -> None:
    at = range(PHASE_3, PHASE_3 + 4)
    with pytest.raises(RewardError) as raised:
        run(tmp_path, *at, on_reward_error=policy)
    text = str(raised.value)
    assert text.startswith("phase 3: the reward raised ConnectionError: the judge is gone at ")
    assert text.endswith(" (4 attempts failed)") == (policy == "retry")
    assert [row["phase"] for row in rows(tmp_path)] == [0, 1, 2, 2]


@pytest.mark.parametrize("options", [{}, ASYNC], ids=str)
def test_a_phase_without_scores_is_logged_and_nothing_is_learned(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    options = {"on_reward_error": "skip", "reward_retries": 1, "eval_every": 99, **options}
    run(tmp_path, 4, 5, missing_eos_penalty=1.0, **options)
    logged = [row for row in rows(tmp_path) if "objective/kl" in row]
    assert [row["phase"] for row in logged] == [1, 2, 3, 4]
    names = [{name for name in row if not name.startswith("time/")} for row in logged]
    assert names == [names[0]] * 4
    assert [row["train/skipped_rewards"] for row in logged] == [0, 0, 1, 1]
    assert [row["policy/steps"] for row in logged] == [6, 6, 0, 6]
    third = logged[2]
    nulls = {name for name, value in third.items() if value is None}
    assert nulls == {
        "objective/scores", "objective/scores_std", "val/explained_variance", "loss/total",
        "loss/policy", "loss/value", "loss/kl", "loss/entropy", "policy/approxkl",
        "policy/clipfrac", "grad_norm/base", "grad_norm/head",
    }  # fmt: skip
    assert third["objective/kl"] > 0
    # Phases 2, 3, 4 of a rise over two phases and a fall over two; the schedule does not wait.
    rates = [row["lr/base"] for row in logged]
    assert rates == pytest.approx([0.5e-2, 1e-2, 1e-2, 0.55e-2])
    told = " ".join(caplog.messages)
    assert "phase 3: attempt 1 of 2 to get scores failed" in told
    assert "(2 attempts failed); nothing is learned from that phase" in told


def test_a_skipped_phase_leaves_weights_and_coefficient(tmp_path: Path) -> None:
    ppo = ppo_with(**SMALL, on_reward_error="skip", reward_retries=0, adaptive_kl_target=1.0)
    setup, state = start(ppo, tmp_path, task=RAGGED, reward=Faulty(at=(2,)))
    seen = []
    for _ in range(3):
        phase(ppo, setup, state)
        seen.append(
            (torch.cat([p.detach().flatten() for p in setup.policy.parameters()]), state.kl_coef)
        )
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1] is not None
    assert not torch.equal(seen[1][0], seen[2][0])
    assert seen[1][1] != seen[2][1]
    assert state.state_dict()["skipped_rewards"] == 1


def test_evaluations_are_never_skipped(tmp_path: Path) -> None:
    at = range(4, 99)
    with pytest.raises(RewardError, match=r"^phase 2: .* \(3 attempts failed\)$"):
        run(tmp_path, *at, on_reward_error="skip", reward_retries=2)
    assert [row["phase"] for row in rows(tmp_path)] == [0, 1, 2]


def test_phases_without_scores_are_skipped_no_more_often_than_allowed(tmp_path: Path) -> None:
    options = {"on_reward_error": "skip", "reward_retries": 0, "eval_every": 99}
    message = r"^phase 3: 0 steps .* and 2 phases without scores were skipped, .*max_skipped=1"
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, 3, 4, max_skipped=1, **options)
    assert [row["phase"] for row in rows(tmp_path)] == [0, 1, 2]

"""The whole chain at toy size: answers imitated, pairs sampled, a reward learned, PPO on it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.models.finetune import Full
from rlhf_exp.models.loading import Pretrained, load_policy
from rlhf_exp.models.reward_model import load_reward_model
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.arithmetic import ArithmeticReward
from rlhf_exp.rewards.reward_model import LearnedReward
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.stages.preferences import Preferences
from rlhf_exp.stages.protocol import Stage, StageResult
from rlhf_exp.stages.reward_model import TrainRewardModel
from rlhf_exp.stages.sft import SFT
from rlhf_exp.tasks.arithmetic import Arithmetic, parse_prompt
from rlhf_exp.tasks.pairs import PairsFile
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import Constant

from ..builders import without_checks
from ..rl.toy import context, ppo_with, rows

pytestmark = pytest.mark.soak  # tests/test_arithmetic.py runs such a chain by commands

SAMPLER = CachedSampler(gen_len=15, stop_at_eos=True)
OPTIMIZER = AdamWSettings(base_lr=3e-3, head_lr=3e-3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, StageResult]]:
    """The folder of the four runs, and the result of each."""
    with without_checks():
        return chain(tmp_path_factory.mktemp("chain"))


def run(stage: Stage[Any], path: Path, **parts: Any) -> StageResult:
    given = context(path)
    result = stage.run(given, stage.Parts(**parts))
    given.presentation.show()
    return result


def chain(path: Path) -> tuple[Path, dict[str, StageResult]]:
    task = Arithmetic()
    sft = Pretrained(base_model=str(path / "sft"))
    learned = {"optimizer": OPTIMIZER, "schedule": Constant()}
    return path, {
        "sft": run(
            SFT(data="demonstrations", layout="pack", max_updates=40, batch_size=64),
            path / "sft",
            task=task,
            model=Scratch(num_layers=2, d_model=32, num_heads=4, context_len=36),
            **learned,
        ),
        "pairs": run(
            Preferences(num_pairs=300, num_held_out=150),
            path / "pairs",
            task=task,
            model=sft,
            reward=ArithmeticReward(),
            sampler=SAMPLER,
        ),
        "reward": run(
            TrainRewardModel(width=32, epochs=10, eval_every=10),
            path / "reward",
            task=PairsFile(path=str(path / "pairs")),
            model=sft,
            **learned,
        ),
        "ppo": run(
            ppo_with(total_phases=2, eval_every=1, eval_samples=32),
            path / "ppo",
            task=task,
            model=sft,
            finetune=Full(),
            reward=LearnedReward(path=str(path / "reward")),
            sampler=SAMPLER,
            **learned,
        ),
    }


def test_every_number_is_finite(results: tuple[Path, dict[str, StageResult]]) -> None:
    path, by_stage = results
    for stage, result in by_stage.items():
        assert all(map(math.isfinite, result.after.values())), stage
        for row in rows(path / stage):
            assert all(math.isfinite(value) for value in row.values()), (stage, row)
        assert set(result.seconds) >= {"load"}


def test_each_stage_left_what_the_next_one_reads(
    results: tuple[Path, dict[str, StageResult]],
) -> None:
    path, _ = results
    assert {p.name for p in (path / "pairs" / "pairs").iterdir()} == {"train.jsonl", "test.jsonl"}
    assert load_policy(path / "ppo").context_len == 36
    own, theirs = load_reward_model(path / "reward"), load_policy(path / "sft")
    for name, tensor in theirs.language_model.state_dict().items():
        assert torch.equal(own.backbone.language_model.state_dict()[name], tensor)
    for picture in ("sft/loss", "reward/loss", "reward/held_out", "ppo/curves"):
        assert (path / f"{picture}.png").is_file()


def test_metrics_have_their_names(results: tuple[Path, dict[str, StageResult]]) -> None:
    _, by_stage = results
    assert {"heldout/exact_match", "heldout/greedy_exact_match"} < set(by_stage["sft"].after)
    assert {"pairs/ties", "pairs/prompts"} < set(by_stage["pairs"].after)
    assert {"heldout/spearman", "heldout/pair_accuracy"} < set(by_stage["reward"].after)
    after = by_stage["ppo"].after
    assert {"eval/exact_match", "eval/greedy_exact_match"} < set(after)
    assert after["eval/reward_gap"] == pytest.approx(
        after["eval/score"] - after["eval/true_reward"]
    )
    assert 1 <= after["eval/true_reward"] <= 7


def test_no_problem_is_on_two_sides(results: tuple[Path, dict[str, StageResult]]) -> None:
    path, _ = results
    split = PairsFile(path=str(path / "pairs")).pair_split()
    train, held_out = ({parse_prompt(pair.prompt) for pair in part} for part in split)
    evaluated = {parse_prompt(s["prompt"]) for s in rows(path / "ppo", "samples.jsonl")}
    assert not train & held_out
    assert not (train | held_out) & evaluated


def test_the_reward_model_beats_chance(results: tuple[Path, dict[str, StageResult]]) -> None:
    _, by_stage = results
    assert by_stage["reward"].after["heldout/pair_accuracy"] > 0.6
    assert by_stage["reward"].after["heldout/spearman"] > 0.1

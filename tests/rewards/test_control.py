"""Rewards without a signal: what they score, and what a run with them shows."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from rlhf_exp.rewards.arithmetic import ArithmeticReward
from rlhf_exp.rewards.char_count import CharCount
from rlhf_exp.rewards.classifier import Classifier
from rlhf_exp.rewards.control import Shuffled, Zero
from rlhf_exp.rewards.protocol import ReadsPrompts, ReadsTokens, is_scored_by_reference
from rlhf_exp.settings import ConfigError
from rlhf_exp.training.optim import AdamWSettings
from tests.builders import build_tokenizer, completions

from ..rl.toy import RAGGED, context, parts, ppo_with, rows
from ..stages.test_resume import Failing, timeless

CPU = torch.device("cpu")
PPO = ppo_with(
    total_phases=4, batch_size=8, eval_every=1, eval_samples=32, checkpoint_every=1,
    limit_samples=24,
)  # fmt: skip


def texts(number: int) -> list[str]:
    """Three texts of that number whose scores are 0, 1 and 2."""
    return [f"{number}" + " ." * score for score in range(3)]


def test_zero_is_the_score_of_everything() -> None:
    assert Zero().load(CPU)(completions(["good", "", "bad ."])).tolist() == [0.0, 0.0, 0.0]


def test_scores_are_dealt_out_in_every_order_alike() -> None:
    score = Shuffled(of=CharCount()).load(CPU)
    drawn = [tuple(score(completions(texts(number))).tolist()) for number in range(1200)]
    orders = Counter(drawn)
    assert all(sorted(order) == [0.0, 1.0, 2.0] for order in orders)
    assert len(orders) == 6
    # Each is drawn 200 times, give or take four standard deviations of 12.9.
    assert all(150 < count < 250 for count in orders.values())


def test_the_order_is_of_the_batch_and_the_seed() -> None:
    batch = completions([f"{i}" + " ." * i for i in range(12)])
    first = Shuffled(of=CharCount()).load(CPU)(batch)
    assert torch.equal(first, Shuffled(of=CharCount()).load(CPU)(batch))
    assert not torch.equal(first, Shuffled(of=CharCount(), seed=1).load(CPU)(batch))
    assert first.sort().values.tolist() == [float(i) for i in range(12)]


def test_what_the_reward_reads_is_asked_of_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = Classifier(name=str(tmp_path), direction="pos")
    assert Shuffled(of=file).fingerprint() == file.fingerprint() != ""
    assert Shuffled(of=CharCount()).fingerprint() == ""
    reward = Shuffled(of=ArithmeticReward())
    assert isinstance(reward, ReadsPrompts)
    with pytest.raises(ConfigError):
        reward.check_prompts(["no series"])
    assert isinstance(reward, ReadsTokens)
    Shuffled(of=CharCount()).check_policy(build_tokenizer(), prepend_bos=False, num_tokens=9)
    assert not is_scored_by_reference(reward)


@pytest.mark.usefixtures("unchecked")
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    def run(name: str, *, at: int | None = None, resume: bool = False) -> None:
        reward = Shuffled(of=Failing(at=at))
        PPO.run(context(tmp_path / name, resume=resume), parts(task=RAGGED, reward=reward))

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", at=8)
    assert 1 < len(rows(tmp_path / "cut")) < len(rows(tmp_path / "whole"))
    run("cut", resume=True)
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_all_kl_of_a_reward_of_zero_is_waste(tmp_path: Path) -> None:
    fast = AdamWSettings(base_lr=3e-2, head_lr=3e-2)
    PPO.run(context(tmp_path), parts(task=RAGGED, reward=Zero(), optimizer=fast))
    last = rows(tmp_path)[-1]
    assert last["eval/kl_sum"] > 0.01
    assert (last["eval/kl_optimal"], last["eval/kl_efficiency"]) == (0.0, 0.0)

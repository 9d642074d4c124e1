"""The true reward of a series: prompt and completion are read apart."""

import math

import pytest
import torch

from rlhf_exp.rewards.arithmetic import ArithmeticReward
from rlhf_exp.rewards.protocol import ReadsTokens, Reward
from rlhf_exp.rewards.weighted_sum import Term, WeightedSum
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.arithmetic import Arithmetic
from tests.builders import completions

CPU = torch.device("cpu")
FIRST = "generate an arithmetic series with 5 terms starting with value 15 and common difference 5"
SECOND = (
    "make a series of arithmetic type which starts at 96 with 9 elements and 2 common difference"
    " value"
)


def test_the_reward_of_each_completion_to_its_own_prompt():
    assert isinstance(ArithmeticReward(), Reward)
    assert not isinstance(ArithmeticReward(), ReadsTokens)
    rows = [
        (FIRST, " 15 20 25 30 35", 7.0),
        (FIRST, " 15 23 25 30 35", 1 + 6 / (1 + 0.1 * math.sqrt(3))),
        (FIRST, " 15 20", 1 + 6 / (1 + 0.1 * math.sqrt(30))),
        (SECOND, " 96 98 100", 7.0),
        (SECOND, " 96 98 100 100", 7.0),
        (SECOND, " 15 20 25 30 35", 1 + 6 / (1 + 0.1 * math.sqrt(81 + 78 + 75 + 70 + 65))),
        (FIRST, "", 1.0),
        (FIRST, " 15 <SEP> 20", 1.0),
        (SECOND, " 96 98 101", 1.0),
    ]
    prompts, answers, expected = zip(*rows, strict=True)
    scores = ArithmeticReward().load(CPU)(completions(answers, before=prompts))
    assert scores.tolist() == pytest.approx(expected, rel=1e-6)
    assert scores.dtype == torch.float32
    assert scores.shape == (len(rows),)


def test_it_is_the_true_reward_of_the_task():
    task = Arithmetic(num_series=1)
    prompts = task.eval_prompts()[:40]
    answers = [task.answer(prompt) for prompt in prompts[1:] + prompts[:1]]
    scores = ArithmeticReward().load(CPU)(completions(answers, before=prompts)).tolist()
    pairs = zip(prompts, answers, strict=True)
    assert scores == pytest.approx([task.true_reward(p, a) for p, a in pairs], rel=1e-6)
    assert min(scores) < 5 < max(scores)


def test_other_completions_change_nothing():
    reward = ArithmeticReward().load(CPU)
    alone = reward(completions([" 15"], before=[FIRST]))
    beside = reward(completions([" 15", " 1 2 3 4 5 6 7 8 9"], before=[FIRST] * 2))
    assert torch.equal(beside[:1], alone)


def test_another_prompt_is_refused():
    with pytest.raises(ValueError, match=r"'this film' is not a prompt of task=arithmetic"):
        ArithmeticReward().load(CPU)(completions([" 15", " 1"], before=[FIRST, "this film"]))


def test_prompts_of_another_task_are_refused_before_anything_is_sampled():
    good = Arithmetic().train_prompts()[:3]
    ArithmeticReward().check_prompts(good)
    with pytest.raises(
        ConfigError, match=r"^reward=arithmetic: 'this movie' is not a prompt of task"
    ):
        ArithmeticReward().check_prompts([*good, "this movie"])
    terms = {"a": Term(weight=1.0, reward=ArithmeticReward())}
    with pytest.raises(ConfigError, match="'this movie' is not a prompt"):
        WeightedSum(terms=terms).check_prompts(["this movie"])

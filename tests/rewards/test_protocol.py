import pytest
import torch

from rlhf_exp.rewards.protocol import TextReward
from tests.builders import completions


class NumLetters(TextReward):
    def score(self, text: str) -> float:
        return len(text)


def test_a_text_reward_scores_prompt_and_completion_of_each_row():
    record = completions(["bc", "", "xyz w"], before=["a", "ab", ""])
    scores = NumLetters().load(torch.device("cpu"))(record)
    assert scores.tolist() == [3.0, 2.0, 5.0]
    assert scores.dtype == torch.float32


def test_a_text_reward_needs_a_score():
    with pytest.raises(TypeError, match="score"):
        TextReward()

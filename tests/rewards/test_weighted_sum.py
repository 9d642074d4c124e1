import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.rewards.char_count import CharCount
from rlhf_exp.rewards.keyword import Keyword
from rlhf_exp.rewards.length import Length
from rlhf_exp.rewards.weighted_sum import Term, WeightedSum
from rlhf_exp.types import Completions
from tests.builders import completions


def test_the_sum_of_the_terms_times_their_weights():
    reward = WeightedSum(
        terms={
            "periods": Term(weight=0.5, reward=CharCount()),
            "good": Term(weight=2.0, reward=Keyword(keywords=["good"], max_count=5)),
            "short": Term(weight=-1.5, reward=Length(target_tokens=2)),
        }
    )
    record = completions(["good . good .", "bad .", "", "good"])
    # Periods 2 1 0 0; good 2 0 0 1; length 4 2 0 1 of 2, so -1 0 -1 -1/2.
    scores = reward.load(torch.device("cpu"))(record)
    assert scores.tolist() == [1 + 4 + 1.5, 0.5, 1.5, 2 + 0.75]
    assert scores.dtype == torch.float32


def test_one_term_is_that_term_scaled():
    reward = WeightedSum(terms={"only": Term(weight=-3, reward=CharCount(character="a"))})
    assert reward.load(torch.device("cpu"))(completions(["a a", "b"])).tolist() == [-6.0, 0.0]


class Loads:
    """A reward that counts how often it is loaded."""

    def __init__(self) -> None:
        self.devices: list[torch.device] = []

    def load(self, device: torch.device):
        self.devices.append(device)
        return lambda completions: torch.ones(len(completions.texts))


def test_each_term_is_loaded_once_to_the_device():
    inner = Loads()
    function = WeightedSum(terms={"a": Term(weight=1, reward=inner)}).load(torch.device("cpu"))
    record: Completions = completions(["x", "y"])
    for _ in range(3):
        assert function(record).tolist() == [1.0, 1.0]
    assert inner.devices == [torch.device("cpu")]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True, "much"])
def test_a_weight_that_is_not_a_number_is_refused(weight):
    with pytest.raises(ValidationError, match="weight"):
        Term(weight=weight, reward=CharCount())


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(ValidationError, match="at least 1 item"):
        WeightedSum(terms={})

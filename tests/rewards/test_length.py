import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.rewards.length import Length
from tests.builders import completions


def test_the_distance_from_the_target_in_units_of_it():
    # As many tokens are real as there are words; the prompt's do not count.
    record = completions(["", "a", "a b", "a b c d", "a b c d e f g", " ".join("a" * 12)])
    scores = Length(target_tokens=4).load(torch.device("cpu"))(record)
    assert scores.tolist() == [-1.0, -0.75, -0.5, 0.0, -0.75, -2.0]
    assert scores.dtype == torch.float32
    longer = Length(target_tokens=8).load(torch.device("cpu"))(record)
    assert longer.tolist() == [-1.0, -0.875, -0.75, -0.5, -0.125, -0.5]


def test_a_target_of_nothing_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Length(target_tokens=0)

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.rewards.char_count import CharCount
from tests.builders import completions

CPU = torch.device("cpu")


def test_periods_of_prompt_and_completion_are_counted():
    # ARENA's exercise: reward_fn(text) = text.count(".") on the whole sample.
    record = completions(
        [" a test. And. So on...", " nothing", "", ".", "U.S. 3.14 \u2026"],
        before=["This is", "This. is.", "This is", "..", ""],
    )
    scores = CharCount().load(CPU)(record)
    assert scores.tolist() == [5.0, 2.0, 0.0, 3.0, 3.0]
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("character", "count"), [("e", 2.0), ("E", 1.0), ("*", 1.0), ("é", 1.0), (" ", 3.0)]
)
def test_the_character_is_taken_as_it_is(character, count):
    record = completions(["Eve * is née"])
    assert CharCount(character=character).load(CPU)(record).tolist() == [count]


def test_only_one_character_is_counted():
    with pytest.raises(ValidationError, match="at most 1 character"):
        CharCount(character="..")
    with pytest.raises(ValidationError, match="at least 1 character"):
        CharCount(character="")

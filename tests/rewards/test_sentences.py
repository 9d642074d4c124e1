import pytest
import torch

from rlhf_exp.rewards.sentences import Sentences, num_sentences
from tests.builders import completions


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One.", 1),
        (" One. Two! Three?", 3),
        ("It is 3.5 m long. So it is.", 2),
        ('He said "no." Then he left.', 2),
        ("Really?! Yes.", 2),
        ("Wait... no.", 2),
        ("One. Two", None),
        ("no end", None),
        ("", None),
        ("One.\nTwo.", None),
        ("One. Two.  \n", 2),
    ],
)
def test_sentences_are_counted(text: str, count: int | None) -> None:
    assert num_sentences(text) == count


def test_only_the_exact_number_scores() -> None:
    record = completions(["A. B. C.", "A. B.", "A. B. C. D.", "A. B. C"])
    reward = Sentences(count=3).load(torch.device("cpu"))
    assert reward(record).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert Sentences(count=2).load(torch.device("cpu"))(record).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_other_numbers_score_part_of_1_if_they_are_near() -> None:
    record = completions(["A. B. C.", "A. B.", "A. B. C. D.", "A. B. C", "A. B. C. D. E. F. G."])
    reward = Sentences(count=3, partial=True).load(torch.device("cpu"))
    assert reward(record).tolist() == pytest.approx([1, 2 / 3, 2 / 3, 0, 0])

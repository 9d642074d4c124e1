import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.rewards.keyword import Keyword
from tests.builders import completions


def scores(texts: list[str], **settings: object) -> list[float]:
    return Keyword(**settings).load(torch.device("cpu"))(completions(texts)).tolist()


def test_whole_words_are_found_whatever_their_case():
    texts = ["Great!", "so GREAT, so", "greatly", "ungreat", "great2", "_great_", "the-great", ""]
    assert scores(texts, keywords=["great"]) == [1, 1, 0, 0, 0, 0, 1, 0]
    assert scores(["great", "GREAT"], keywords=["Great"]) == [1, 1]


def test_words_are_not_made_at_a_seam_of_letters_beyond_ascii():
    assert scores(["über", "überx", "füber", "ÜBER"], keywords=["über"]) == [1, 0, 0, 1]


@pytest.mark.parametrize(("max_count", "expected"), [(1, 1), (2, 2), (3, 3), (9, 4)])
def test_the_count_is_capped(max_count, expected):
    text = "good good, bad. Good (good)"
    assert scores([text, "bad"], keywords=["good"], max_count=max_count) == [expected, 0]


def test_several_keywords_count_together():
    texts = ["good and fine", "fine", "good good fine", "neither"]
    assert scores(texts, keywords=["good", "fine"], max_count=10) == [2, 1, 3, 0]


def test_keywords_of_several_words():
    texts = ["not very good", "very, good", "very goodness"]
    assert scores(texts, keywords=["very good"]) == [1, 0, 0]


@pytest.mark.parametrize(
    ("keyword", "hit", "miss"),
    [
        ("c++", "I like C++ best", "I like c and ccc"),
        ("a.b", "see a.b here", "see axb here"),
        ("(x)", "that is (x)", "that is x"),
        ("what?", "so what? yes", "so wha yes"),
        (".*", "with .* in it", "with anything in it"),
        ("a|b", "both a|b", "only a or b"),
    ],
)
def test_characters_of_regular_expressions_stand_for_themselves(keyword, hit, miss):
    assert scores([hit, miss], keywords=[keyword]) == [1, 0]


def test_the_prompt_counts_too():
    record = completions([" film", " bad"], before=["good", "a goo"])
    assert Keyword(keywords=["good"]).load(torch.device("cpu"))(record).tolist() == [1, 0]
    # And a word that prompt and completion make together.
    record = completions(["d film"], before=["goo"])
    assert Keyword(keywords=["good"]).load(torch.device("cpu"))(record).tolist() == [1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keywords": []}, "at least 1 item"),
        ({"keywords": [""]}, "at least 1 character"),
        ({"keywords": ["good"], "max_count": 0}, "greater than or equal to 1"),
        ({}, "Missing|required"),
    ],
)
def test_settings_that_count_nothing_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        Keyword(**wrong)

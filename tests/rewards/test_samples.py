import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_exp.rewards.protocol import RewardError
from rlhf_exp.rewards.samples import Samples, cut, read_scores, to_samples
from rlhf_exp.types import Completions
from tests.builders import completions

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
CPU = torch.device("cpu")


def with_rows(texts: list[str], rows: list[dict[str, Any]]) -> Completions:
    """Completions of these texts to prompts that have these rows."""
    record = completions(texts)
    return dataclasses.replace(
        record, prompts=dataclasses.replace(record.prompts, rows=tuple(rows))
    )


def samples(*texts: str) -> Samples:
    return to_samples(completions(texts, before=[f"before {text}" for text in texts]))


def test_texts_come_as_texts_and_conversations_as_messages():
    record = with_rows(["yes", "no"], [{"prompt": "one"}, {"prompt": "<hello>", "messages": HELLO}])
    ours = to_samples(record)
    assert ours.prompts == ["one", HELLO]
    assert ours.completions == ["yes", [{"role": "assistant", "content": "no"}]]
    assert ours.columns == {}
    assert len(ours) == 2


def test_a_column_is_a_list_with_none_where_a_row_has_no_entry():
    rows = [
        {"prompt": "a", "answer": 4},
        {"prompt": "b", "source": ["x"], "messages": None},
        {"prompt": "c", "answer": 0, "source": ["y"]},
    ]
    ours = to_samples(with_rows(["", "", ""], rows))
    assert ours.columns == {"answer": [4, None, 0], "source": [None, ["x"], ["y"]]}
    assert ours.prompts == ["a", "b", "c"]


def test_token_ids_are_those_that_are_not_masked_out():
    record = completions(["a b c", "", "d"])
    tokens = torch.tensor([[7, 8, 2], [0, 0, 0], [9, 0, 0]])
    ours = to_samples(dataclasses.replace(record, tokens=tokens))
    assert ours.completion_ids == [[7, 8, 2], [], [9]]


def test_a_scorer_that_changes_its_lists_changes_no_row():
    row = {"prompt": "<hello>", "messages": [dict(HELLO[0])], "tags": ["x"]}
    record = with_rows(["yes"], [row])
    ours = to_samples(record)
    ours.prompts[0][0]["content"] = "changed"
    ours.columns["tags"][0].append("y")
    ours.completions.clear()
    assert row == {"prompt": "<hello>", "messages": [HELLO[0]], "tags": ["x"]}
    assert len(ours) == 1
    assert ours.show(0) == "samples[0]: prompt '<hello>', completion 'yes'"


def test_a_part_has_its_share_of_every_list_and_knows_its_place():
    record = completions(["a", "b b", "c", "d"], before=["1", "2", "3", "4"])
    rows = tuple({**row, "n": i} for i, row in enumerate(record.prompts.rows))
    whole = to_samples(
        dataclasses.replace(record, prompts=dataclasses.replace(record.prompts, rows=rows))
    )
    part = whole.part(1, 3)
    assert (part.prompts, part.completions) == (["2", "3"], ["b b", "c"])
    assert part.completion_ids == [[1, 1], [1]]
    assert part.columns == {"n": [1, 2]}
    assert part.show(1) == "samples[2]: prompt '3', completion 'c'"
    assert part.part(1, 2).show(0) == part.show(1)
    assert len(whole.part(3, 9)) == 1


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5, -2.0],
        (1.0, 0.5, -2),
        np.array([1.0, 0.5, -2.0]),
        np.array([1.0, 0.5, -2.0], dtype=np.float16),
        torch.tensor([1.0, 0.5, -2.0], requires_grad=True),
        torch.tensor([1.0, 0.5, -2.0], dtype=torch.bfloat16),
        [True, Fraction(1, 2), np.int64(-2)],
        [np.bool_(True), np.float32(0.5), np.array(-2.0)],
        [torch.tensor(1), torch.tensor(0.5), torch.tensor(-2.0)],
    ],
)
def test_lists_arrays_and_tensors_of_any_real_numbers_are_scores(values):
    scores = read_scores(values, samples("a", "b", "c"), who="it")
    assert scores == [1.0, 0.5, -2.0]
    assert {type(score) for score in scores} == {float}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (None, r"it gave None instead"),
        (0.5, r"it gave float 0\.5 instead"),
        ("0.5", r"it gave str '0\.5' instead"),
        ({"a": 1.0}, r"it gave dict \{'a': 1\.0\} instead"),
        ({1.0, 2.0}, r"it gave set"),
        (iter([1.0, 2.0]), r"it gave list_iterator"),
        (torch.zeros(2, 1), r"it gave Tensor of shape \(2, 1\)"),
        (np.float64(1), r"it gave float64"),
        (np.zeros((1, 2)), r"it gave ndarray of shape \(1, 2\)"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(values, said):
    message = said + r"(.|\n)*one for each sample\nsamples\[0\]: prompt 'before a', completion 'a'$"
    with pytest.raises(RewardError, match=message):
        read_scores(values, samples("a", "b"), who="it")


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]], torch.zeros(3)])
def test_a_wrong_number_of_scores_is_refused(values):
    with pytest.raises(
        RewardError,
        match=rf"^it gave {len(values)} scores for 2 samples; it must give one for each, the first"
        r" for\nsamples\[0\]: prompt 'before a', completion 'a'$",
    ):
        read_scores(values, samples("a", "b"), who="it")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (None, "None"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (np.float32("nan"), "nan"),
        (torch.tensor(math.nan), "nan"),
        ("1.0", "'1.0'"),
        ([1.0], r"\[1\.0\]"),
        (1 + 2j, r"\(1\+2j\)"),
        (1e39, r"1e\+39"),
        (-1e39, r"-1e\+39"),
        (10**400, "1000+"),
        (torch.zeros(1), r"tensor\(\[0\.\]\)"),
        (np.zeros(1), r"array\(\[0\.\]\)"),
    ],
)
def test_an_entry_that_is_no_finite_number_is_refused_with_its_sample(entry, said):
    with pytest.raises(
        RewardError,
        match=rf"^it gave .*{said}.* as scores\[1\] \(1 such of 3\); every score must be a finite"
        r" number in fp32\nsamples\[1\]: prompt 'before b', completion 'b'$",
    ):
        read_scores([0.0, entry, 1.0], samples("a", "b", "c"), who="it")


def test_the_first_of_several_bad_entries_is_named_by_its_place_in_the_batch():
    part = samples("a", "b", "c", "d").part(1, 4)
    with pytest.raises(
        RewardError, match=r"as scores\[2\] \(2 such of 3\)(.|\n)*samples\[2\].*'c'"
    ):
        read_scores([0.0, None, math.nan], part, who="it")


@pytest.mark.parametrize("values", [torch.tensor([0.0, math.nan]), np.array([0.0, math.nan])])
def test_an_entry_of_an_array_is_told_as_a_number(values):
    with pytest.raises(RewardError, match=r"^it gave nan as scores\[1\]"):
        read_scores(values, samples("a", "b"), who="it")


def test_the_largest_number_of_fp32_is_a_score():
    largest = torch.finfo(torch.float32).max
    scores = read_scores([largest, -largest], samples("a", "b"), who="it")
    assert torch.tensor(scores, dtype=torch.float32).isfinite().all()


def test_a_long_text_is_shown_by_its_ends():
    long = "begins " + "x" * 500 + " ends"
    shown = samples(long).show(0)
    assert "'before begins xx" in shown
    assert "xx ends'" in shown
    assert len(shown) < 250
    assert cut("short\n") == r"'short\n'"
    assert len(cut(long, 40)) == 40

"""Arithmetic series: rewards worked by hand, problems held out in every wording, a closed
vocabulary."""

import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pydantic import ValidationError

from rlhf_exp.tasks.arithmetic import (
    TEMPLATES,
    Arithmetic,
    Problem,
    parse_answer,
    parse_prompt,
    series_reward,
)
from rlhf_exp.tasks.hashing import hash_fraction
from rlhf_exp.tasks.protocol import AnswerTask, CorpusTask, DemonstrationTask, PairTask

CONF = Path(__file__).parents[2] / "conf/task"
TASK = Arithmetic(num_series=400)
FIRST = "generate an arithmetic series with 5 terms starting with value 15 and common difference 5"
SECOND = (
    "make a series of arithmetic type which starts at 15 with 5 elements and 5 common difference"
    " value"
)
THIRD = (
    "Let 5 be the number of terms 15 the starting number and 5 the common difference then write"
    " the arithmetic series"
)
WORDINGS = (FIRST, SECOND, THIRD)


@pytest.fixture(scope="module")
def demonstrations():
    return TASK.demonstration_split()


def problems(prompts):
    return {parse_prompt(prompt) for prompt in prompts}


def test_it_offers_texts_demonstrations_and_answers_and_reads_no_files():
    for kind in (CorpusTask, DemonstrationTask, AnswerTask):
        assert isinstance(TASK, kind)
    assert not isinstance(TASK, PairTask)
    assert TASK.fingerprint() == ""
    assert TASK.prepend_bos is False


def test_the_yaml_file_is_the_class_with_its_defaults():
    config = OmegaConf.load(CONF / "arithmetic.yaml")
    assert set(config) == {"_target_", *(field.name for field in fields(Arithmetic))}
    assert instantiate(config) == Arithmetic()


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, rlhf_exp.tasks.arithmetic\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("problem", "series"),
    [
        (Problem(15, 5, 5), [15, 20, 25, 30, 35]),
        (Problem(0, 1, 6), [0, 1, 2, 3, 4, 5]),
        (Problem(72, 4, 8), [72, 76, 80, 84, 88, 92, 96, 100]),  # 100 itself is a value
        (Problem(72, 4, 9), [72, 76, 80, 84, 88, 92, 96, 100]),
        (Problem(99, 9, 14), [99]),
        (Problem(73, 9, 5), [73, 82, 91, 100]),
    ],
)
def test_a_series_stops_at_a_hundred(problem, series):
    assert problem.series() == series


def test_the_three_wordings_ask_for_the_same_problem():
    for prompt in WORDINGS:
        assert parse_prompt(prompt) == parse_prompt(f" {prompt}\n") == Problem(15, 5, 5)
        assert TASK.answer(prompt) == " 15 20 25 30 35"
        assert TASK.true_reward(prompt, " 15 20 25 30 35") == 7
    # Three different numbers, each in its place.
    assert parse_prompt(FIRST.replace("5 terms", "9 terms").replace("e 15", "e 2")) == (2, 5, 9)
    assert parse_prompt(SECOND.replace("5 el", "9 el").replace("at 15", "at 2")) == (2, 5, 9)
    assert parse_prompt(THIRD.replace("Let 5", "Let 9").replace("15", "2")) == (2, 5, 9)


@pytest.mark.parametrize(
    "prompt",
    ["", "15 20 25", FIRST + " 15", "please " + FIRST, FIRST.replace("15", "x"), FIRST.upper()],
)
def test_any_other_text_is_refused(prompt):
    for ask in (parse_prompt, TASK.answer, lambda text: TASK.true_reward(text, " 15")):
        with pytest.raises(
            ValueError, match=rf"^{re.escape(repr(prompt))} is not a prompt of task="
        ):
            ask(prompt)


def test_rewards_worked_by_hand():
    # One value wrong by 2.
    assert series_reward([15, 20, 25], [15, 20, 27]) == pytest.approx(6.2566, abs=5e-5)
    # 15 23 25 30 35 is wrong by 3 in one place: 1 + 6 / (1 + 0.1 sqrt 3).
    exact = [15, 20, 25, 30, 35]
    assert series_reward(exact, [15, 23, 25, 30, 35]) == pytest.approx(6.114, abs=5e-4)
    # The distance is summed before the root: 1 + 2 + 1 is a distance of 2.
    assert series_reward([5, 5, 5], [4, 7, 6]) == pytest.approx(1 + 6 / 1.2, abs=1e-12)
    # 100 off in one place: 1 + 6 / (1 + 0.1 * 10) is the middle between 1 and 7.
    assert series_reward([0], [100]) == pytest.approx(4, abs=1e-12)
    assert series_reward(exact, exact) == 7


def test_the_shorter_of_the_two_is_continued_with_its_last_value():
    # 15 20 continued by 20 20 20 is 5 + 10 + 15 = 30 off.
    by_hand = 1 + 6 / (1 + 0.1 * math.sqrt(30))
    assert series_reward([15, 20, 25, 30, 35], [15, 20]) == pytest.approx(by_hand, abs=1e-12)
    # The exact series 15 20 continued by 20 20: 25 and 30 are 5 and 10 too much.
    by_hand = 1 + 6 / (1 + 0.1 * math.sqrt(15))
    assert series_reward([15, 20], [15, 20, 25, 30]) == pytest.approx(by_hand, abs=1e-12)
    # Not moved along: a missing first value shifts all others.
    by_hand = 1 + 6 / (1 + 0.1 * math.sqrt(5 + 5))
    assert series_reward([15, 20, 25], [20, 25]) == pytest.approx(by_hand, abs=1e-12)


def test_a_hundred_is_a_value_and_its_series_scores_seven():
    prompt = TASK.train_prompts()[0].split(" with ")[0] + (
        " with 9 terms starting with value 72 and common difference 4"
    )
    assert TASK.answer(prompt) == " 72 76 80 84 88 92 96 100"
    assert TASK.true_reward(prompt, TASK.answer(prompt)) == 7
    assert TASK.true_reward(prompt, " 72 76 80 84 88 92 96 101") == 1


@pytest.mark.parametrize(
    "answer",
    ["", "  ", "15 20 x", "15 -20", "15 20 101", "15, 20", "15 20.0", "٣ 20", "15 ² 20", "15 <SEP>",
     FIRST],
)  # fmt: skip
def test_an_answer_that_is_no_list_of_values_gets_one(answer):
    assert TASK.true_reward(FIRST, answer) == 1


def test_values_are_read_whatever_stands_between_them():
    assert parse_answer(" 15 20  25\n30\t100 0") == [15, 20, 25, 30, 100, 0]
    assert parse_answer("") == []
    assert parse_answer("15 101") is None


def test_an_answers_reward_does_not_depend_on_other_answers():
    # Each is continued to the exact series alone, not to the longest answer: the longer of two
    # answers to a prompt changes nothing for the shorter one.
    answers = [" 15", " 15 20 25 30 35", " 15 20 25 30 35 40 45 50", " 1 2 3 4 5 6 7 8 9 10 11"]
    alone = [TASK.true_reward(FIRST, answer) for answer in answers]
    assert alone == [TASK.true_reward(FIRST, answer) for answer in answers[::-1]][::-1]
    # 15 five times: 5 + 10 + 15 + 20 off, not more for an answer of eleven beside it.
    assert alone[0] == pytest.approx(1 + 6 / (1 + 0.1 * math.sqrt(50)), abs=1e-12)


def test_the_nearer_answer_is_the_better_one_and_all_lie_between_one_and_seven():
    answers = [
        " 15 20 25 30 35",
        " 15 20 25 30 36",
        " 15 20 25 30 40",
        " 15 20 25 30",
        " 15",
        " 99",
    ]
    rewards = [TASK.true_reward(FIRST, answer) for answer in answers]
    assert rewards[2] == rewards[3]  # 5 off by a wrong value and by a missing one
    assert sorted(set(rewards), reverse=True) == rewards[:3] + rewards[4:]
    assert max(rewards) == 7
    assert min(rewards) > 1


def test_problems_are_held_out_in_every_wording(demonstrations):
    train, tuned_on = demonstrations
    parts = [TASK.train_prompts(), [d.prompt for d in tuned_on], TASK.eval_prompts()]
    assert [d.prompt for d in train] == list(parts[0])
    kinds = [problems(part) for part in parts]
    assert [3 * len(kind) for kind in kinds] == [len(set(part)) for part in parts]
    assert all(len(part) == len(set(part)) for part in parts)
    assert sum(map(len, kinds)) == len(set.union(*kinds)) == 100 * 9 * 10
    assert set.union(*kinds) == {
        (start, difference, terms)
        for start in range(100)
        for difference in range(1, 10)
        for terms in range(5, 15)
    }
    # Four standard errors of a share of a tenth in 9,000: 0.0126.
    for kind in kinds[1:]:
        assert len(kind) / 9000 == pytest.approx(0.1, abs=0.0126)


@pytest.mark.parametrize("fraction", [0.01, 0.25])
def test_both_held_out_sets_have_the_share_that_is_asked_for(fraction):
    task = Arithmetic(held_out_fraction=fraction)
    evaluated_on, trained_on = len(task.eval_prompts()) / 3, len(task.train_prompts()) / 3
    error = 4 * math.sqrt(fraction * (1 - fraction) / 9000)
    assert evaluated_on / 9000 == pytest.approx(fraction, abs=error)
    tuned_on = 9000 - evaluated_on - trained_on
    assert tuned_on / 9000 == pytest.approx(fraction, abs=error)
    assert len(task.demonstration_split().held_out) == 3 * tuned_on


def test_more_held_out_keeps_what_was_held_out_to_evaluate_on():
    few, many = (Arithmetic(held_out_fraction=f) for f in (0.1, 0.2))
    assert set(few.eval_prompts()) < set(many.eval_prompts())


def test_the_seed_decides_the_split():
    assert Arithmetic().eval_prompts() == TASK.eval_prompts()
    other = problems(Arithmetic(data_seed=1).eval_prompts())
    shared = len(other & problems(TASK.eval_prompts())) / len(other)
    assert shared == pytest.approx(0.1, abs=0.04)


def test_the_split_is_the_same_in_every_process_and_version():
    code = (
        "from rlhf_exp.tasks.arithmetic import Arithmetic\n"
        "task = Arithmetic(num_series=2)\n"
        "print(task.eval_prompts()[0], task.language_split().train[0], sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines() == [TASK.eval_prompts()[0], TASK.language_split().train[0]]
    held_out = parse_prompt(TASK.eval_prompts()[0])
    assert hash_fraction(f"0 {held_out}") < 0.1
    assert str(held_out).startswith("Problem(start=")


def test_every_demonstration_is_the_exact_answer(demonstrations):
    for split in demonstrations:
        for prompt, response in split[::50]:
            start, difference, terms = parse_prompt(prompt)
            values = [v for v in range(start, start + terms * difference, difference) if v <= 100]
            assert response == "".join(f" {value}" for value in values)
            assert TASK.true_reward(prompt, response) == 7
            assert TASK.answer(prompt) == response


def test_texts_are_three_series_of_the_problems_that_they_may_show(demonstrations):
    language = TASK.language_split()
    assert [len(part) for part in language] == [400, 40]
    for texts, part in zip(language, demonstrations, strict=True):
        allowed = {response.strip() for _, response in part}
        for text in texts:
            series = text.split(" <SEP> ")
            assert len(series) == 3
            assert set(series) <= allowed
    assert len(set(language.train)) == 400
    assert language == Arithmetic(num_series=400).language_split()
    assert set(language.train).isdisjoint(language.held_out)
    other = Arithmetic(num_series=400, data_seed=1).language_split()
    assert set(language.train).isdisjoint(other.train)


def test_texts_of_series_are_at_least_one_and_other_counts_only_cut_them_short():
    fewer = Arithmetic(num_series=3).language_split()
    assert fewer.train == TASK.language_split().train[:3]
    assert fewer.held_out == TASK.language_split().held_out[:1]


def test_the_vocabulary_is_129_tokens_and_holds_every_text_one_token_a_word():
    tokenizer = TASK.build_tokenizer()
    assert len(tokenizer) == 129
    vocab = tokenizer.get_vocab()
    assert {str(value) for value in range(101)} < set(vocab)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == (
        "<PAD>", "<EOS>", None
    )  # fmt: skip
    assert tokenizer.unk_token is None
    language = TASK.language_split()
    texts = [*WORDINGS, *TASK.eval_prompts(), *language.train, *language.held_out]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert [vocab[word] for word in text.split()] == ids
        assert tokenizer.decode(ids) == text
    assert TASK.build_tokenizer().get_vocab() == vocab
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        tokenizer("15 101")


def test_the_longest_example_has_36_tokens_and_the_longest_text_45(demonstrations):
    # The wordings have 15, 18 and 21 words; 14 values and EOS follow, or three series with two
    # <SEP> between and EOS after.
    examples = demonstrations.train[::10] + demonstrations.held_out
    tokenizer = TASK.build_tokenizer()
    prompts = {len(ids) for ids in tokenizer([d.prompt for d in examples])["input_ids"]}
    answers = {len(ids) for ids in tokenizer([d.response for d in examples])["input_ids"]}
    assert prompts == {15, 18, 21}
    assert answers == set(range(1, 15))
    texts = tokenizer(list(TASK.language_split().train))["input_ids"]
    assert max(map(len, texts)) <= 3 * 14 + 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"held_out_fraction": 0.0}, "greater than or equal to 0.01"),
        ({"held_out_fraction": 0.26}, "less than or equal to 0.25"),
        ({"held_out_fraction": float("nan")}, "finite number"),
        ({"num_series": 0}, "greater than or equal to 1"),
        ({"data_seed": -1}, "greater than or equal to 0"),
        ({"prepend_bos": True}, "prepend_bos"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        Arithmetic(**wrong)


@pytest.mark.parametrize(
    "prompt",
    [
        TEMPLATES[0].format(start=500, difference=1, terms=5),
        TEMPLATES[1].format(start=5, difference=1, terms=0),
        TEMPLATES[2].format(start="\u0665", difference=1, terms=5),
    ],
)
def test_a_problem_without_an_answer_is_no_prompt(prompt: str) -> None:
    with pytest.raises(ValueError, match="is not a prompt of task=arithmetic"):
        parse_prompt(prompt)


def test_a_number_of_any_length_is_no_value() -> None:
    assert parse_answer("7 " + "9" * 5000) is None


def test_a_share_that_holds_nothing_out_is_refused() -> None:
    with pytest.raises(ValueError, match="held_out_fraction"):
        Arithmetic(held_out_fraction=0.005)

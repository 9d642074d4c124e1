"""Talking to a model: what it is asked, what it remembers, what it prints."""

import json
from pathlib import Path

import pytest
import torch

from rlhf_exp.models.loading import load_policy
from rlhf_exp.models.saving import save_policy
from rlhf_exp.report.talk import Talk
from rlhf_exp.settings import ConfigError
from tests.builders import tiny_policy

TEMPLATE = (
    "{% for m in messages %}{{ 'one' if m.role == 'user' else 'two' }} {{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}two{% endif %}"
)


def saved(folder: Path, *, template: str | None = None) -> str:
    policy = tiny_policy(seed=3)
    policy.tokenizer.chat_template = template
    save_policy(policy, folder)
    return str(folder)


def greedy(model: str, text: str, count: int) -> str:
    """The most probable tokens after a text, through EOS."""
    policy = load_policy(model)
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + count and ids[-1] != policy.tokenizer.eos_token_id:
        ids.append(int(policy(torch.tensor([ids]))[0][0, -1].argmax()))
    return policy.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_without_a_template_each_line_is_continued_by_itself(tmp_path, capsys) -> None:
    model = saved(tmp_path)
    talk = Talk(model, temperature=0.0, seed=0)
    assert "each line is continued" in talk.kind
    for line in ("three four", "five"):
        expected = greedy(model, line, 6)
        assert talk.answer(line, max_new_tokens=6) == expected
        assert expected.split() == capsys.readouterr().out.split()


def test_with_a_template_the_conversation_goes_on_until_it_is_reset(tmp_path, capsys) -> None:
    model = saved(tmp_path, template=TEMPLATE)
    talk = Talk(model, temperature=0.0, seed=0)
    assert "the conversation goes on" in talk.kind
    first = talk.answer("three", max_new_tokens=4)
    assert first == greedy(model, "one three two", 4)
    second = talk.answer("four", max_new_tokens=4)
    assert second == greedy(model, f"one three two {first} one four two", 4)
    talk.take("/reset", max_new_tokens=4)
    assert talk.answer("three", max_new_tokens=4) == first
    capsys.readouterr()


def test_sampling_follows_the_seed_and_the_full_distribution(tmp_path, capsys) -> None:
    model = saved(tmp_path)
    answers = {
        seed: Talk(model, temperature=2.0, seed=seed).answer("one", max_new_tokens=12)
        for seed in (0, 1)
    }
    assert answers[0] != answers[1]
    assert Talk(model, temperature=2.0, seed=0).answer("one", max_new_tokens=12) == answers[0]
    capsys.readouterr()


def test_no_room_and_a_negative_temperature_are_refused(tmp_path, capsys) -> None:
    model = saved(tmp_path)
    with pytest.raises(ConfigError, match=r"--temperature=-1.0"):
        Talk(model, temperature=-1.0, seed=0)
    talk = Talk(model, temperature=0.0, seed=0)
    with pytest.raises(ConfigError, match=r"context is full \(32 tokens\): /reset"):
        talk.answer(" ".join(["one"] * 32), max_new_tokens=4)
    assert len(talk.answer(" ".join(["one"] * 31), max_new_tokens=4).split()) <= 1
    capsys.readouterr()


def test_what_found_no_room_was_not_said(tmp_path, capsys) -> None:
    talk = Talk(saved(tmp_path, template=TEMPLATE), temperature=0.0, seed=0)
    first = talk.answer("three", max_new_tokens=4)
    with pytest.raises(ConfigError, match="context is full"):
        talk.answer(" ".join(["four"] * 40), max_new_tokens=4)
    follows = talk.answer("five", max_new_tokens=4)
    assert follows == greedy(str(tmp_path), f"one three two {first} one five two", 4)
    capsys.readouterr()


def test_settings_of_generation_that_came_with_the_model_are_left_out(tmp_path, capsys) -> None:
    model = saved(tmp_path)
    plain = Talk(model, temperature=0.0, seed=0).answer("three", max_new_tokens=12)
    path = tmp_path / "generation_config.json"
    brought = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "eos_token_id": [2, 4, 5, 6]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **brought}))
    assert Talk(model, temperature=0.0, seed=0).answer("three", max_new_tokens=12) == plain
    capsys.readouterr()


def test_a_line_is_taken_as_an_answer_or_a_reset_and_no_room_is_said(tmp_path, capsys) -> None:
    talk = Talk(saved(tmp_path, template=TEMPLATE), temperature=0.0, seed=0)
    talk.take("three", max_new_tokens=4)
    first = capsys.readouterr().out
    talk.take(" ".join(["four"] * 40), max_new_tokens=4)
    assert capsys.readouterr().err.startswith("error: the model's context is full")
    talk.take("/reset", max_new_tokens=4)
    assert capsys.readouterr().out == ""
    talk.take("three", max_new_tokens=4)
    assert capsys.readouterr().out == first

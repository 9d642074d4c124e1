"""TRL's preference formats: each is read as the same pairs, and what has no single reading is
refused with its place and the fix."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.pair_formats import read_pair, shared_prompt_end
from rlhf_exp.tasks.pairs import PairsFile, num_shared, read_pairs, write_pairs
from rlhf_exp.tasks.protocol import Pair, PromptRow, Split

SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED = [SYSTEM, user("Sky?"), answer("Blue."), user("Why?")]
EXPLICIT = {"prompt": ASKED, "chosen": [answer("Light.")], "rejected": [answer("Paint.")]}
WHOLE = {name: [*ASKED, *EXPLICIT[name]] for name in ("chosen", "rejected")}
EXPECTED = Pair(ASKED, "Light.", "Paint.")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FORMATS = {
    "texts": (
        {"prompt": "Sky? Why?", "chosen": " Light.", "rejected": " Paint."},
        Pair("Sky? Why?", " Light.", " Paint."),
    ),
    "whole texts": (
        {"chosen": "Sky? Why? Light.", "rejected": "Sky? Why? Paint."},
        Pair("Sky? Why?", " Light.", " Paint."),
    ),
    "conversations": (EXPLICIT, EXPECTED),
    "whole conversations": (WHOLE, EXPECTED),
    # As in UltraFeedback, whose scores may be equal.
    "a text beside them": (WHOLE | {"prompt": "Why?", "score_chosen": 1.0}, EXPECTED),
    "rewards": (
        EXPLICIT | {"chosen_reward": 2, "rejected_reward": 1, "rejected_ended": False},
        Pair(ASKED, "Light.", "Paint.", 2.0, 1.0, rejected_ended=False),
    ),
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(("row", "expected"), FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_pair(
    row: dict[str, Any], expected: Pair, ending: str, tmp_path: Path
) -> None:
    file = write(tmp_path / f"pairs.{ending}", [row] * 2)
    assert [*read_pairs(file)] == [(1, expected), (2, expected)]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("A:", " yes", " no"),
        ("A:", "\nyes", " no"),
        ("A:\n", "yes", "no"),
        ("A:", "  yes", " no"),
        ("A:", " blue", " black"),  # not "A: bl"
        ("The sky is", " blue.", " blue!"),
        ("The sky is", " blue", " bluer"),
        ("The sky is", "", " blue"),
        ("A: blue", " sky", " sea"),  # what both answers begin with belongs to the prompt
    ],
)
def test_whole_texts_are_cut_before_the_first_word_that_differs(
    prompt: str, chosen: str, rejected: str
) -> None:
    for texts in ((prompt + chosen, prompt + rejected), (prompt + rejected, prompt + chosen)):
        assert texts[0][: shared_prompt_end(*texts)] == prompt


def test_where_no_spaces_separate_words_texts_are_cut_where_they_differ() -> None:
    assert shared_prompt_end("天空?蓝色", "天空?灰色") == 3


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a tool's message": (
        EXPLICIT | {"chosen": [{"role": "tool", "content": "42"}]},
        ", field chosen ends with a message of tool: the answer must be a message of assistant",
    ),
    "a call of a tool": (
        EXPLICIT | {"rejected": [answer("") | {"tool_calls": [{"name": "f"}]}]},
        ", field rejected holds the message {.*}; give role (one of system, user, assistant, tool,"
        " developer), content (a text) and no tool_calls or function_call",
    ),
    "an answer of several messages": (
        EXPLICIT | {"rejected": [answer("Paint."), user("No."), answer("Light.")]},
        ", field rejected holds 3 messages: give one, the assistant's answer, and put earlier ones"
        " into prompt; whole conversations need no prompt",
    ),
    "no message": (EXPLICIT | {"chosen": []}, ", field chosen holds 0 messages: give one"),
    "whole conversations that differ earlier": (
        WHOLE | {"rejected": [SYSTEM, user("Sky?"), answer("Grey."), *WHOLE["rejected"][3:]]},
        ", field rejected differs from chosen before the last message: they may differ only in the"
        " last one, the assistant's answer; cut both behind the first answer that differs",
    ),
    "an answer to nothing": (
        {name: EXPLICIT[name] for name in ("chosen", "rejected")},
        ", field chosen: before the answer stands nothing; give a message that is not blank",
    ),
    "an answer to an answer": (
        EXPLICIT | {"prompt": ASKED[:3]},
        ", field prompt: before the answer stands {'content': 'Blue.', 'role': 'assistant'}; give a"
        " message that is not blank, and not of assistant",
    ),
    "an answer to a blank": (
        EXPLICIT | {"prompt": [user(" ")]},
        ", field prompt: before the answer stands {'content': ' ', 'role': 'user'}; give a message",
    ),
    "a question for an answer": (
        EXPLICIT | {"rejected": [user("Why?")]},
        ", field rejected ends with a message of user: the answer must be a message of assistant",
    ),
    "a conversation among texts": (
        {"prompt": ASKED, "chosen": "Light.", "rejected": "Paint."},
        ", field prompt is a list: give prompt, chosen and rejected all as texts, or all as lists",
    ),
    "one answer as a text": (
        WHOLE | {"rejected": "Paint."},
        ", field chosen is a list: give prompt, chosen and rejected all as texts, or all as lists",
    ),
    "a number for a prompt": (
        EXPLICIT | {"prompt": 3},
        ", field prompt is a int: give prompt, chosen and rejected all as texts, or all as lists",
    ),
    "messages without roles": (
        EXPLICIT | {"chosen": ["Light."]},
        ", field chosen holds the message 'Light.'; give role (one of system, user, assistant,",
    ),
    "half a surrogate pair": (
        EXPLICIT | {"chosen": [answer("\ud800")]},
        ", field chosen is not Unicode text (surrogates not allowed); fix it",
    ),
    "equal answers": (
        EXPLICIT | {"rejected": EXPLICIT["chosen"]},
        ", field rejected equals chosen: two equal texts have no order; remove the row",
    ),
    "nothing in common": (
        {"chosen": "Light.", "rejected": "Paint."},
        " has no field prompt, and chosen and rejected begin with no common text: add a column"
        " prompt",
    ),
    "a null prompt": (
        WHOLE | {"prompt": None},
        " has no field prompt: pairs need prompt, chosen, rejected; it has chosen, rejected",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_without_a_single_reading_is_refused(row: dict[str, Any], message: str) -> None:
    expected = re.escape(f"FILE, row 7{message}").replace(re.escape("{.*}"), ".*")
    with pytest.raises(ConfigError, match=f"^{expected}") as error:
        read_pair(row, "FILE, row 7")
    assert len(str(error.value).splitlines()) == 1


# A user's message, with or without a system message before it.
MANY = [
    Pair([*[SYSTEM][: i % 2], user(f"Question {i // 2 % 20}?")], f"Good {i}.", f"Bad {i}.")
    for i in range(120)
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_conversations_are_written_as_trl_has_them_and_read_again(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    file = tmp_path / f"pairs.{ending}"
    write_pairs([EXPECTED, *MANY], file)
    assert [pair for _, pair in read_pairs(file)] == [EXPECTED, *MANY]
    loader = "json" if ending == "jsonl" else ending
    loaded = load_dataset(loader, data_files=str(file), cache_dir=str(tmp_path / "cache"))["train"]
    assert {name: loaded[0][name] for name in EXPLICIT} == EXPLICIT


def test_equal_conversations_stay_on_one_side_of_the_split(tmp_path: Path) -> None:
    write_pairs(MANY, tmp_path / "pairs.jsonl")
    task = PairsFile(path=str(tmp_path / "pairs.jsonl"), held_out_fraction=0.25)
    train, held_out = task.pair_split()
    sides = [[repr(pair.prompt) for pair in part] for part in (train, held_out)]
    assert sorted(sides[0] + sides[1]) == sorted(repr(pair.prompt) for pair in MANY)
    assert not {*sides[0]} & {*sides[1]}
    assert len(held_out) == 3 * len({*sides[1]}) > 3
    prompts = task.train_prompts() + task.eval_prompts()
    assert len(prompts) == 40
    assert [*prompts[:1]] == [PromptRow(train[0].prompt, {})]
    assert {repr(row.prompt) for row in task.eval_prompts()} == {*sides[1]}
    assert num_shared(task.pair_split()) == 0
    assert num_shared(Split(tuple(MANY[:1]), tuple(MANY[:81]))) == 3

"""The task of a dataset: which rows become prompts, which are held out, and what is refused."""

import json
import math
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pyarrow import parquet
from pydantic import ValidationError

from rlhf_exp.settings import ConfigError, Fingerprinted
from rlhf_exp.tasks.dataset import PromptDataset
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.tasks.protocol import CorpusTask, PromptRow, ShapesPrompts, Task
from tests.builders import WORDS, build_tokenizer

CONF = Path(__file__).parents[2] / "conf/task/dataset.yaml"


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def write(file: Path, *rows: dict) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def numbered(count: int) -> list[dict]:
    return [{"prompt": f"prompt {i}", "n": i} for i in range(count)]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.jsonl"


def whole(path: str, **settings) -> PromptDataset:
    return PromptDataset(path=path, held_out_fraction=0, **settings)


def prompts(task: PromptDataset) -> list:
    return [row.prompt for row in task.train_prompts()]


def parts(task: PromptDataset) -> tuple[set, set]:
    return tuple({row.prompt for row in p} for p in (task.train_prompts(), task.eval_prompts()))


# Formats

CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
QUESTION = [user("Which?")]
FORMATS = {  # TRL's: standard and conversational
    "prompt only": ({"prompt": "The sky is"}, "The sky is"),
    "prompt only, conversational": ({"prompt": QUESTION}, QUESTION),
    "prompt and completion": ({"prompt": "The sky is", "completion": " blue."}, "The sky is"),
    "prompt and completion, conversational": (
        {"prompt": [system("Be brief."), *QUESTION], "completion": [assistant("That.")]},
        [system("Be brief."), *QUESTION],
    ),
    "preference": ({"prompt": "The sky", "chosen": " is.", "rejected": " was."}, "The sky"),
    "preference, conversational": (
        {"prompt": QUESTION, "chosen": [assistant("a")], "rejected": [assistant("b")]},
        QUESTION,
    ),
    "unpaired preference": ({"prompt": "The", "completion": " sky", "label": True}, "The"),
    "stepwise": ({"prompt": "1+1", "completions": ["a", "b"], "labels": [True, False]}, "1+1"),
    "language modelling": ({"text": "The sky is blue."}, "The sky is blue."),
    "language modelling, conversational": (
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
        [user("a"), assistant("b"), user("c")],
    ),
    "a prompt beside its conversation": (
        {"messages": [user("Which?"), assistant("That.")], "prompt": "Which?", "prompt_id": "7"},
        "Which?",
    ),
    "a text beside a conversation": ({"messages": QUESTION, "text": "a b"}, "a b"),
    "an answer that is begun": ({"prompt": [*QUESTION, assistant("Th")]}, QUESTION),
    "several answers": ({"prompt": [*QUESTION, assistant("a"), assistant("b")]}, QUESTION),
    "an answer that calls": (
        {"messages": [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        QUESTION,
    ),
    "the result of a call": (
        {"messages": [*QUESTION, assistant("f()"), {"role": "tool", "content": "4"}]},
        [*QUESTION, assistant("f()"), {"role": "tool", "content": "4"}],
    ),
    "a developer": (
        {"messages": [{"role": "developer", "content": ""}, *QUESTION]},
        [{"role": "developer", "content": ""}, *QUESTION],
    ),
    "keys that say nothing": (
        {"messages": [user("a") | {"tool_calls": None, "function_call": [], "name": "b"}]},
        [user("a")],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_every_format_of_trl_gives_its_prompt_and_keeps_the_other_columns(tmp_path, name, ending):
    row, prompt = FORMATS[name]
    path = tmp_path / f"a{ending}"
    if ending == ".jsonl":
        write(path, row)
    else:  # in which an empty list and a missing one are of no type
        row = json.loads(json.dumps(row).replace("[]", "null"))
        parquet.write_table(pa.Table.from_pylist([row]), path)
    (found,) = whole(str(path)).train_prompts()
    assert isinstance(found, PromptRow)
    assert found.prompt == prompt
    column = next(name for name in ("prompt", "text", "messages") if name in row)
    assert found.columns == {k: v for k, v in row.items() if k != column}


def test_keys_that_arrow_adds_to_messages_are_no_part_of_them(tmp_path):
    called = {"role": "assistant", "content": "f()", "tool_calls": [CALL]}
    given = [{"prompt": [user("a")]}, {"prompt": [user("b"), called]}]
    parquet.write_table(pa.Table.from_pylist(given), tmp_path / "a.parquet")
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist()[0]["prompt"] != [user("a")]
    assert sorted(prompts(whole(str(tmp_path / "a.parquet"))), key=repr) == [
        [user("a")],
        [user("b")],
    ]


def test_texts_and_conversations_may_stand_in_one_file(file):
    task = whole(write(file, {"prompt": "a"}, {"prompt": [user("b")], "n": 1}))
    assert sorted(task.train_prompts(), key=repr) == [
        PromptRow("a", {"n": None}),
        PromptRow([user("b")], {"n": 1}),
    ]


def test_the_column_that_is_asked_for_is_the_prompt(file):
    row = {"prompt": "a", "text": "b", "chosen": [user("c"), assistant("d")], "messages": None}
    path = write(file, row)
    assert prompts(whole(path)) == ["a"]
    assert whole(path, column="text").train_prompts() == (
        PromptRow("b", {"prompt": "a", "chosen": row["chosen"], "messages": None}),
    )
    assert prompts(whole(path, column="chosen")) == [[user("c")]]
    with pytest.raises(ConfigError) as caught:
        whole(path, column="question").fingerprint()
    assert str(caught.value) == (
        f"task.path: {path} has no column question; it has prompt, text, chosen, messages: set"
        " task.column to the one with the prompts"
    )


def test_a_dataset_without_a_column_of_prompts_is_refused(file):
    with pytest.raises(ConfigError, match=r"has no column prompt, text or messages; it has chosen"):
        whole(write(file, {"chosen": "a", "rejected": "b"})).fingerprint()


def test_a_csv_prompt_is_a_text_whatever_it_looks_like(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,question,n\nNA,1,1\n007,2,2\n")
    assert set(prompts(whole(str(path)))) == {"NA", "007"}
    assert set(prompts(whole(str(path), column="question"))) == {"1", "2"}
    assert {row.columns["n"] for row in whole(str(path)).train_prompts()} == {1, 2}


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n \ntwo three\n")
    assert sorted(prompts(whole(str(tmp_path / "a.txt")))) == ["one", "two three"]


# What is refused

GOOD = {"prompt": "a"}
REFUSED = {
    "missing": ({"n": 1}, "is blank; fill it in, or set task.min_chars=1 to drop such rows"),
    "none": ({"prompt": None}, "is blank; fill it in"),
    "empty": ({"prompt": ""}, "is blank; fill it in"),
    "blank": ({"prompt": " \n\u3000"}, "is blank; fill it in"),
    "a number": ({"prompt": 3}, r"is 3; give a text or a list of messages$"),
    "a mapping": ({"prompt": user("a")}, r"is {'content': 'a', 'role': 'user'}; give a text or a"),
    "a blank message": (
        {"prompt": [{"role": "user", "content": " "}]},
        "ends with a blank message; fill it in or remove the row",
    ),
    "no messages": ({"prompt": []}, "has no message before the assistant's; add a user's message"),
    "only answers": ({"prompt": [assistant("a")]}, "has no message before the assistant's"),
    "texts": ({"prompt": ["a"]}, r"holds the message 'a'; give role \(one of system, user, assist"),
    "none for a message": ({"prompt": [None]}, r"holds the message None; give role"),
    "no role": ({"prompt": [{"content": "a"}]}, r"holds the message {'content': 'a'}; give role"),
    "another role": ({"prompt": [{"role": "human", "content": "a"}]}, "'role': 'human'}; give rol"),
    "a list for a role": ({"prompt": [{"role": ["user"], "content": "a"}]}, "; give role"),
    "no content": ({"prompt": [{"role": "user"}]}, r"content \(a text\) and no tool_calls or func"),
    "parts": ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "; give"),
    "calls": ({"prompt": [assistant("") | {"tool_calls": [CALL]}, user("a")]}, "no tool_calls"),
    "a call": ({"prompt": [assistant("") | {"function_call": {"name": "f"}}, user("")]}, "no tool"),
    "from and value": ({"prompt": [{"from": "human", "value": "a"}]}, "holds the message {'from':"),
    "half a character": (
        {"prompt": "a \ud83d"},
        r"is not Unicode text \(surrogates not allowed\);",
    ),
    "half in a message": ({"prompt": [user("\ud83d")]}, r"is not Unicode text \(surrogates"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_is_no_prompt_is_named_by_its_place_in_the_file(file, name):
    row, message = REFUSED[name]
    task = whole(write(file, GOOD, GOOD, row, GOOD), data_seed=1)
    with pytest.raises(ConfigError, match=message) as caught:
        task.fingerprint()
    text = str(caught.value)
    assert text.startswith(f"task.path: {file}, train, row 3: prompt ")
    assert "\n" not in text
    assert len(text) < len(str(file)) + 320


def test_the_column_and_the_part_of_a_bad_row_are_named(tmp_path):
    write(tmp_path / "train.jsonl", {"q": "a"})
    write(tmp_path / "test.jsonl", {"q": "b"}, {"q": None})
    task = PromptDataset(path=str(tmp_path), column="q", eval_split="test[1:]")
    with pytest.raises(
        ConfigError, match=rf"^task\.path: {tmp_path}, test\[1:\], row 2: q is blank;"
    ):
        task.fingerprint()


def test_the_split_that_is_missing_is_named_by_its_own_field(file):
    path = write(file, *numbered(3))
    with pytest.raises(
        ConfigError, match=r"^task\.split=test: .* has no such split; it has train,"
    ):
        PromptDataset(path=path, split="test").fingerprint()
    with pytest.raises(
        ConfigError, match=r"^task\.eval_split=dev: .* has no such split; it has tr"
    ):
        PromptDataset(path=path, eval_split="dev").fingerprint()
    with pytest.raises(ConfigError, match=r"^task\.subset=en: .*; set it null"):
        PromptDataset(path=path, subset="en").fingerprint()
    with pytest.raises(ConfigError, match=r"^task\.revision=v1: .*; set it null"):
        PromptDataset(path=path, revision="v1").fingerprint()
    with pytest.raises(ConfigError, match=r"^task\.path=.*none\.jsonl: no such file"):
        PromptDataset(path="none.jsonl").fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is above max_tokens=4: lower it"),
        (
            {"first_tokens_min": 3, "first_tokens_max": 2},
            "first_tokens_min=3 is above first_tokens_max=2",
        ),
        ({"first_tokens_min": 3}, "first_tokens_min and first_tokens_max: set both, or both null"),
        ({"first_tokens_max": 3}, "first_tokens_min and first_tokens_max: set both, or both null"),
        ({"path": ""}, "at least 1 character"),
        ({"column": ""}, "at least 1 character"),
        ({"eval_split": ""}, "at least 1 character"),
        ({"subset": ""}, "at least 1 character"),
        ({"revision": ""}, "at least 1 character"),
        ({"split": ""}, "at least 1 character"),
        ({"min_tokens": 0}, "greater than or equal to 1"),
        ({"max_prompts": 0}, "greater than or equal to 1"),
        ({"min_chars": -1}, "greater than or equal to 0"),
        ({"held_out_fraction": 1.5}, "less than or equal to 1"),
        ({"prompts": 1}, "prompts"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        PromptDataset(**{"path": "a.jsonl", **settings})


# What is left out


def test_short_texts_are_left_out_and_blank_ones_have_no_characters(file):
    given = ["", " \t ", "abc", " a ", "abcd", None]
    path = write(file, *({"prompt": prompt} for prompt in given), {"n": 1})
    assert sorted(prompts(whole(path, min_chars=1))) == [" a ", "abc", "abcd"]
    assert sorted(prompts(whole(path, min_chars=3))) == [" a ", "abc", "abcd"]
    assert prompts(whole(path, min_chars=4)) == ["abcd"]
    with pytest.raises(ConfigError) as caught:
        whole(path, min_chars=5).fingerprint()
    assert str(caught.value) == (
        f"task.min_chars=5: {path} has no prompt of that length in train (7 rows); lower it"
    )


def test_conversations_are_not_measured_in_characters(file):
    assert prompts(whole(write(file, {"prompt": [user("a")]}), min_chars=9)) == [[user("a")]]
    with pytest.raises(ConfigError, match="has no message before"):
        whole(write(file, {"prompt": []}), min_chars=9).fingerprint()


def shape(task: PromptDataset, length: int, prompt: str = "a") -> list[int] | None:
    ids = task.shape_prompt(PromptRow(prompt, {}), list(range(length)))
    return None if ids is None else list(ids)


def test_prompts_of_too_few_or_too_many_tokens_are_left_out():
    task = PromptDataset(path="a", min_tokens=3, max_tokens=5)
    assert [shape(task, n) is not None for n in range(2, 7)] == [False, True, True, True, False]
    assert shape(task, 4) == [0, 1, 2, 3]
    assert shape(PromptDataset(path="a", max_tokens=5), 0) is None
    assert shape(PromptDataset(path="a"), 10_000) == list(range(10_000))


def test_a_text_is_cut_to_its_first_tokens():
    task = PromptDataset(path="a", first_tokens_min=2, first_tokens_max=4)
    lengths = [len(shape(task, 9, f"text {i}")) for i in range(600)]
    assert set(lengths) == {2, 3, 4}
    # Thirds of 600; six standard deviations are 70.
    assert all(abs(lengths.count(n) - 200) < 70 for n in (2, 3, 4))
    assert shape(task, 9, "text 1") == list(range(lengths[1]))
    assert shape(task, 1) == [0]
    assert {len(shape(task, 3, f"text {i}")) for i in range(50)} == {2, 3}
    fixed = PromptDataset(path="a", first_tokens_min=4, first_tokens_max=4)
    assert {len(shape(fixed, 9, f"text {i}")) for i in range(50)} == {4}
    other = PromptDataset(path="a", first_tokens_min=2, first_tokens_max=4, data_seed=1)
    assert [len(shape(other, 9, f"text {i}")) for i in range(50)] != lengths[:50]


def test_the_length_of_the_whole_text_decides_whether_it_is_left_out():
    task = PromptDataset(path="a", first_tokens_min=2, first_tokens_max=2, max_tokens=5)
    assert shape(task, 6) is None
    task = PromptDataset(path="a", first_tokens_min=2, first_tokens_max=2, min_tokens=5)
    assert shape(task, 5) == [0, 1]


def test_first_tokens_do_not_depend_on_other_rows(file):
    def cut(*texts: str) -> dict[str, tuple[int, ...]]:
        task = whole(
            write(file, *({"prompt": t} for t in texts)), first_tokens_min=1, first_tokens_max=8
        )
        batch = encode_prompts(
            build_tokenizer(), task.train_prompts(), prepend_bos=False, shaping=task
        )
        kept = batch.mask.sum(dim=1).tolist()
        return {row.prompt: n for row, n in zip(task.train_prompts(), kept, strict=True)}

    texts = [" ".join(WORDS[(i + j) % 10] for j in range(10)) for i in range(10)]
    every = cut(*texts)
    assert len(set(every.values())) > 3
    assert cut(*texts[4:7], "one two") == {t: every[t] for t in texts[4:7]} | cut("one two")


def test_conversations_are_not_cut(file):
    path = write(file, GOOD, {"prompt": [user("a")]})
    with pytest.raises(ConfigError) as caught:
        whole(path, first_tokens_min=1, first_tokens_max=8).fingerprint()
    assert str(caught.value) == (
        f"task.first_tokens_max=8 cuts texts, but {path}, train, row 2 is a conversation: set it"
        " and task.first_tokens_min null"
    )


def test_at_most_so_many_prompts_are_a_random_part_that_the_seed_chooses(file):
    path = write(file, *numbered(400))
    chosen = {seed: prompts(whole(path, max_prompts=40, data_seed=seed)) for seed in range(3)}
    assert all(len(set(each)) == 40 for each in chosen.values())
    assert prompts(whole(path, max_prompts=40)) == chosen[0]
    assert chosen[0] == prompts(whole(path))[:40]
    assert len({frozenset(each) for each in chosen.values()}) == 3
    for each in chosen.values():
        mean = sum(int(prompt.split()[1]) for prompt in each) / 40
        assert abs(mean - 199.5) < 5 * 115.5 / math.sqrt(40)
    assert len(prompts(whole(path, max_prompts=1000))) == 400


def test_rows_that_are_not_chosen_are_not_looked_at(file):
    path = write(file, *numbered(50), {"prompt": 3})
    order = prompts(whole(write(file.with_name("b.jsonl"), *numbered(51))))
    place = order.index("prompt 50")
    assert 0 < place < 50
    assert prompts(whole(path, max_prompts=place)) == order[:place]
    with pytest.raises(ConfigError, match="row 51: prompt is 3"):
        whole(path, max_prompts=place + 1).fingerprint()


def test_left_out_texts_do_not_count_among_the_chosen(file):
    path = write(file, *(row for i in range(20) for row in ({"prompt": f"long {i}"}, GOOD)))
    assert len(prompts(whole(path, max_prompts=20, min_chars=2))) == 20


def test_the_order_is_random_and_the_seeds(file):
    path = write(file, *numbered(100))
    order = prompts(whole(path))
    assert sorted(order) == sorted(f"prompt {i}" for i in range(100))
    assert order != [f"prompt {i}" for i in range(100)]
    assert prompts(whole(path, data_seed=1)) != order
    assert prompts(whole(path)) == order


# What is held out


def test_a_share_of_the_prompts_is_held_out(file):
    path = write(file, *numbered(1000))
    train, held_out = parts(PromptDataset(path=path, held_out_fraction=0.2))
    assert not train & held_out
    assert len(train | held_out) == 1000
    # Five standard deviations of a binomial of 1000 and 0.2.
    assert abs(len(held_out) - 200) < 64
    other = parts(PromptDataset(path=path, held_out_fraction=0.2, data_seed=1))[1]
    # By chance 40 are in both.
    assert len(other & held_out) < 80
    assert held_out < parts(PromptDataset(path=path, held_out_fraction=0.4))[1]


@pytest.mark.parametrize("conversational", [False, True])
def test_equal_prompts_stay_together(file, conversational):
    texts = [f"text {i % 30}" for i in range(300)]
    given = [
        {"prompt": [user(text), assistant(f"{i}")] if conversational else text, "n": i}
        for i, text in enumerate(texts)
    ]
    task = PromptDataset(path=write(file, *given), held_out_fraction=0.5)
    train, held_out = (
        [repr(row.prompt) for row in part] for part in (task.train_prompts(), task.eval_prompts())
    )
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 300
    assert {row.columns["n"] for row in (*task.train_prompts(), *task.eval_prompts())} == set(
        range(300)
    )


def test_further_rows_do_not_move_others_between_the_parts(file):
    given = numbered(300)
    before = parts(PromptDataset(path=write(file, *given[100:]), held_out_fraction=0.5))
    after = parts(PromptDataset(path=write(file, *given), held_out_fraction=0.5))
    assert before[0] < after[0]
    assert before[1] < after[1]


def test_without_a_held_out_part_what_is_trained_on_is_evaluated_on(file):
    task = whole(write(file, *numbered(5)))
    assert task.eval_prompts() == task.train_prompts()
    assert len(task.train_prompts()) == 5


def test_a_share_that_leaves_nothing_to_train_on_is_refused(file):
    path = write(file, *numbered(5))
    with pytest.raises(ConfigError) as caught:
        PromptDataset(path=path, held_out_fraction=1).fingerprint()
    assert str(caught.value) == (
        f"task.held_out_fraction=1.0 leaves none of the 5 prompts of {path} to train on: lower it,"
        " name an eval_split, or set it 0 to evaluate on the training prompts"
    )


@pytest.mark.parametrize(("fraction", "expected"), [(0.34, 4), (0.1, 1), (1e-9, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_of_few_prompts_the_share_is_held_out_and_told(file, caplog, fraction, expected, seed):
    caplog.set_level("INFO")
    path = write(file, *numbered(12))
    train, held_out = parts(PromptDataset(path=path, held_out_fraction=fraction, data_seed=seed))
    assert (len(train), len(held_out)) == (12 - expected, expected)
    told = f"task.held_out_fraction={fraction:g}: {expected} of 12 distinct prompts are held out"
    assert told in caplog.messages


def test_another_split_is_evaluated_on_without_what_is_trained_on(tmp_path):
    write(tmp_path / "train.jsonl", *numbered(10))
    write(tmp_path / "test.jsonl", *numbered(14)[8:])
    task = PromptDataset(path=str(tmp_path), eval_split="test")
    assert parts(task)[0] == {f"prompt {i}" for i in range(10)}
    assert parts(task)[1] == {f"prompt {i}" for i in range(10, 14)}
    task = PromptDataset(path=str(tmp_path), split="test", eval_split="train[:8]", max_prompts=3)
    assert [len(part) for part in parts(task)] == [3, 3]


def test_another_split_that_holds_nothing_new_is_refused(file):
    path = write(file, *numbered(10))
    with pytest.raises(ConfigError) as caught:
        PromptDataset(path=path, eval_split="train[:5]").fingerprint()
    assert str(caught.value) == (
        f"task.eval_split=train[:5]: {path} has no prompt there that is not in train too"
    )
    task = PromptDataset(path=path, split="train[5:]", eval_split="train[:5]")
    assert parts(task)[1] == {f"prompt {i}" for i in range(5)}


# The task


def test_the_fingerprint_is_of_prompts_columns_and_parts(file):
    def fingerprint(*rows: dict, **settings) -> str:
        task = PromptDataset(path=write(file, *rows), held_out_fraction=0.5, **settings)
        return task.fingerprint()

    given = numbered(20)
    first = fingerprint(*given)
    assert len(first) == 64
    assert first == fingerprint(*given)
    others = [
        fingerprint(*given[:-1]),
        fingerprint(*given[:-1], {"prompt": "prompt 19", "n": 20}),
        fingerprint(*given[:-1], {"prompt": "prompt 20", "n": 19}),
        fingerprint(*given, data_seed=1),
        fingerprint(*given, max_prompts=19),
    ]
    assert len({first, *others}) == 6
    # The same prompts in the same order, and another one of them the first that is held out.
    seed = next(s for s in range(9) if prompts(whole(str(file), split="train[:2]", data_seed=s))
                == ["prompt 0", "prompt 1"])  # fmt: skip
    moved = [
        PromptDataset(
            path=str(file), split=f"train[:{n}]", eval_split=f"train[{n}:3]", data_seed=seed
        )
        for n in (1, 2)
    ]
    assert moved[0].train_prompts() + moved[0].eval_prompts() == (
        moved[1].train_prompts() + moved[1].eval_prompts()
    )
    assert moved[0].fingerprint() != moved[1].fingerprint()


def test_a_dataset_that_is_still_to_be_made_has_no_fingerprint():
    assert PromptDataset(path="artifact:prompts").fingerprint() == ""


def test_the_file_is_read_once(file):
    task = whole(write(file, *numbered(3)))
    found = task.train_prompts()
    file.unlink()
    assert task.eval_prompts() == found
    assert len(task.fingerprint()) == 64


def test_it_is_a_task_that_shapes_its_prompts():
    task = PromptDataset(path="a.jsonl")
    assert isinstance(task, Task)
    assert isinstance(task, ShapesPrompts)
    assert isinstance(task, Fingerprinted)
    assert not isinstance(task, CorpusTask)


def test_the_yaml_file_is_the_class_with_its_defaults():
    config = OmegaConf.load(CONF)
    assert set(config) == {"_target_", *(field.name for field in fields(PromptDataset))}
    assert OmegaConf.is_missing(config, "path")
    config.path = "a.jsonl"
    assert instantiate(config) == PromptDataset(path="a.jsonl")

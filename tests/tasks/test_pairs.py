"""Pairs from files: what is refused and how it is named, what is held out, and that other tools
read what is written."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pyarrow import Table, parquet

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.hashing import hash_fraction
from rlhf_exp.tasks.pairs import (
    PairsFile,
    hold_out,
    locate_pairs,
    num_shared,
    read_pairs,
    write_pairs,
)
from rlhf_exp.tasks.protocol import CorpusTask, Pair, PairTask, Split

CONF = Path(__file__).parents[2] / "conf/task"
ROW = {"prompt": "p", "chosen": " good", "rejected": " bad"}
ODD = [
    Pair("p ü", ' a "quoted"\n\tanswer', " b\u2028c\u0085", 2.5, -1.25, True, False),
    Pair(" p", " a ", "c\r\nd", 7.0, 1.0, False, True),
    Pair("p{}", "\\n", "日本 <EOS>", 1e-9, 0.0),
]


def make(prompt: str, i: int) -> Pair:
    return Pair(prompt, f" good {i}", f" bad {i}")


MANY = [make(f"prompt {i % 40}", i) for i in range(120)]


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def table(path: Path, rows: list[dict]) -> str:
    parquet.write_table(Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def path(tmp_path):
    write_pairs(MANY, tmp_path / "pairs.jsonl")
    return str(tmp_path / "pairs.jsonl")


def test_the_yaml_file_is_the_class_with_its_defaults(path):
    config = OmegaConf.load(CONF / "pairs.yaml")
    assert set(config) == {"_target_", *(field.name for field in fields(PairsFile))}
    assert OmegaConf.is_missing(config, "path")
    config.path = path
    assert instantiate(config) == PairsFile(path=path)
    assert isinstance(PairsFile(path=path), PairTask)
    assert not isinstance(PairsFile(path=path), CorpusTask)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("pairs", [ODD, MANY], ids=["odd texts", "no rewards"])
def test_what_is_written_is_read_again(ending, pairs, tmp_path):
    file = tmp_path / "new" / f"pairs.{ending}"
    write_pairs(pairs, file)
    assert [*read_pairs(file)] == [*enumerate(pairs, start=1)]


@pytest.mark.parametrize(("ending", "loader"), [("jsonl", "json"), ("parquet", "parquet")])
@pytest.mark.parametrize("pairs", [ODD, MANY], ids=["odd texts", "no rewards"])
def test_datasets_reads_what_is_written(ending, loader, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    files = {name: str(tmp_path / f"{name}.{ending}") for name in ("train", "test")}
    write_pairs(pairs, Path(files["train"]))
    write_pairs(pairs[:2], Path(files["test"]))
    loaded = load_dataset(loader, data_files=files, cache_dir=str(tmp_path / "cache"))
    assert [Pair(**row) for row in loaded["train"]] == pairs
    assert [Pair(**row) for row in loaded["test"]] == pairs[:2]


def test_parquet_of_datasets_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import Dataset

    Dataset.from_list([pair._asdict() for pair in ODD]).to_parquet(str(tmp_path / "p.parquet"))
    assert [pair for _, pair in read_pairs(tmp_path / "p.parquet")] == ODD


def test_what_is_not_given_is_unknown_rewards_and_answers_that_ended(tmp_path):
    null = {"chosen_reward": None, "rejected_reward": None, "chosen_ended": None}
    rows = [ROW, ROW | null, ROW | {"rejected_ended": False, "source": 3, "extra": [1]}]
    expected = [Pair("p", " good", " bad")] * 2 + [Pair("p", " good", " bad", rejected_ended=False)]
    assert [pair for _, pair in read_pairs(Path(jsonl(tmp_path / "p.jsonl", rows)))] == expected
    for row, pair in zip(rows, expected, strict=True):
        assert [*read_pairs(Path(table(tmp_path / "p.parquet", [row])))] == [(1, pair)]
    whole = [ROW | {"chosen_reward": 2, "rejected_reward": -1}]
    [(_, pair)] = read_pairs(Path(jsonl(tmp_path / "p.jsonl", whole)))
    assert pair[3:5] == (2.0, -1.0)
    assert {type(value) for value in pair[3:5]} == {float}


def test_blank_lines_and_a_bom_are_skipped_and_rows_keep_their_numbers(tmp_path):
    file = tmp_path / "p.jsonl"
    lines = ["", json.dumps(ROW), " ", json.dumps(ROW | {"prompt": "q"}), ""]
    file.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert [(row, pair.prompt) for row, pair in read_pairs(file)] == [(2, "p"), (4, "q")]


BAD_ROWS = {
    "no prompt": (ROW | {"prompt": None}, "no field prompt: pairs need prompt, chosen,"),
    "no chosen": ({"prompt": "p", "rejected": "b"}, "no field chosen: .*has prompt, rejected$"),
    "null": (ROW | {"rejected": None}, "no field rejected: "),
    "a number": (ROW | {"chosen": 3}, "field chosen is a int: give prompt, chosen and"),
    "no text": (ROW | {"prompt": ""}, "field prompt is blank: fill it in"),
    "blank": (ROW | {"prompt": " \n"}, "field prompt is blank: fill it in or remove the row"),
    "equal": (ROW | {"rejected": " good"}, "field rejected equals chosen: two equal texts have no"),
    "one reward": (ROW | {"chosen_reward": 1.0}, "one reward but no rejected_reward: give both"),
    "other reward": (ROW | {"rejected_reward": 1.0}, "one reward but no chosen_reward: give both"),
    "NaN": (
        ROW | {"chosen_reward": float("nan"), "rejected_reward": 1.0},
        "field chosen_reward is nan: give a finite number",
    ),
    "infinite": (
        ROW | {"chosen_reward": 1.0, "rejected_reward": float("-inf")},
        "field rejected_reward is -inf: give a finite number",
    ),
    "contradictory": (
        ROW | {"chosen_reward": 1.0, "rejected_reward": 2.5},
        "field chosen_reward is 1, not above rejected_reward 2.5: swap the answers",
    ),
    "a tie": (
        ROW | {"chosen_reward": 1.0, "rejected_reward": 1.0},
        "field chosen_reward is 1, not above rejected_reward 1: swap the answers, or remove a tie",
    ),
    "a text for a reward": (
        ROW | {"chosen_reward": "2", "rejected_reward": "1"},
        "field chosen_reward is '2': give a finite number",
    ),
    "a boolean for a reward": (
        ROW | {"chosen_reward": True, "rejected_reward": False},
        "field chosen_reward is True: give a finite number",
    ),
    "a number for ended": (ROW | {"chosen_ended": 1}, "field chosen_ended is 1: give true or"),
    "a text for ended": (ROW | {"rejected_ended": "no"}, "field rejected_ended is 'no': give true"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_malformed_row_is_refused_with_its_file_row_and_field(row, message, tmp_path):
    for name, rows, write in (("bad.jsonl", [ROW, row], jsonl), ("bad.parquet", [row], table)):
        expected = rf"^task\.path: .*{name}, row {len(rows)}(,| has) {message}"
        with pytest.raises(ConfigError, match=expected) as error:
            [*read_pairs(Path(write(tmp_path / name, rows)))]
        assert len(str(error.value).splitlines()) == 1


BAD_LINES = {
    "not JSON": ("{'prompt': 1}", r"row 2 is not JSON \(Expecting property name.*\); give one"),
    "cut off": ('{"prompt": "p", ', r"row 2 is not JSON \("),
    "deep": ("[" * 10_000, r"row 2 is not JSON \(maximum recursion depth"),
    "digits without end": ("9" * 5000, r"row 2 is not JSON \(Exceeds the limit"),
    "a list": ('["p", "a", "b"]', r"row 2 is \['p', 'a', 'b'\]; give an object"),
    "a text": ('"p"', "row 2 is 'p'; give an object"),
    "null": ("null", "row 2 is None; give an object"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_object_is_refused(line, message, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(ConfigError, match=rf"^task\.path: .*bad\.jsonl, {message}"):
        [*read_pairs(file)]


@pytest.mark.parametrize("contents", ["", "\n \n", "\ufeff\n"])
def test_an_empty_file_is_refused(contents, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(contents, encoding="utf-8")
    expected = r"^task\.path: .*bad\.jsonl holds no rows"
    with pytest.raises(ConfigError, match=expected):
        [*read_pairs(file)]
    schema = parquet.read_table(table(tmp_path / "one.parquet", [ROW])).schema
    parquet.write_table(schema.empty_table(), tmp_path / "bad.parquet")
    with pytest.raises(ConfigError, match=r"bad\.parquet holds no rows"):
        [*read_pairs(tmp_path / "bad.parquet")]


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes('{"prompt": "café"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^task\.path: .*bad\.jsonl, line 1 is not UTF-8; save"):
        [*read_pairs(tmp_path / "bad.jsonl")]
    (tmp_path / "bad.parquet").write_text(json.dumps(ROW))
    expected = r"^task\.path: .*bad\.parquet cannot be read as Parquet: [^\n]+$"
    with pytest.raises(ConfigError, match=expected):
        [*read_pairs(tmp_path / "bad.parquet")]


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for ending in ("jsonl", "parquet"):
        (tmp_path / f"folder.{ending}").mkdir()
        with pytest.raises(ConfigError, match=rf"^task\.path=.*folder\.{ending} cannot be read"):
            [*read_pairs(tmp_path / f"folder.{ending}")]


def test_a_path_with_nothing_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text("")  # without a test file
    (tmp_path / "test.parquet").write_text("")
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(ConfigError, match=rf"^task\.path={path}: no such file, and no folder"):
            PairsFile(path=str(path)).fingerprint()


@pytest.mark.parametrize("where", [".", "pairs"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_folder_with_train_and_test_files_is_split_as_they_are(where, ending, tmp_path):
    files = [tmp_path / where / f"{name}.{ending}" for name in ("train", "test")]
    for file, pairs in zip(files, (MANY[:90], MANY[90:]), strict=True):
        write_pairs(pairs, file)
    task = PairsFile(path=str(tmp_path), held_out_fraction=0.5)
    assert locate_pairs(str(tmp_path)) == files
    train, held_out = task.pair_split()
    assert (list(train), list(held_out)) == (MANY[:90], MANY[90:])
    assert task.sources().train[89] == f"{files[0]}, row 90"
    assert task.sources().held_out == tuple(f"{files[1]}, row {i}" for i in range(1, 31))
    digest = hashlib.sha256(files[0].read_bytes() + files[1].read_bytes()).hexdigest()
    assert task.fingerprint() == digest
    assert len(task.train_prompts()) == 40
    assert list(task.eval_prompts()) == [f"prompt {i % 40}" for i in range(90, 120)]


def test_prompts_of_a_single_file_are_held_out_whole(path):
    task = PairsFile(path=path, held_out_fraction=0.25)
    train, held_out = task.pair_split()
    assert sorted(train + held_out) == sorted(MANY)
    assert set(task.train_prompts()).isdisjoint(task.eval_prompts())
    expected = {f"prompt {i}" for i in range(40) if hash_fraction(f"0 prompt {i}") < 0.25}
    assert set(task.eval_prompts()) == expected
    assert len(held_out) == 3 * len(expected) == 3 * len(task.eval_prompts())
    # In the file's order, each with its row.
    assert list(train) == [pair for pair in MANY if pair.prompt not in expected]
    for part, sources in zip((train, held_out), task.sources(), strict=True):
        assert sources == tuple(f"{path}, row {MANY.index(pair) + 1}" for pair in part)
    assert task.fingerprint() == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert PairsFile(path=path, held_out_fraction=0.25).pair_split() == task.pair_split()


def test_the_seed_and_the_prompt_alone_decide_what_is_held_out(path, tmp_path):
    task, other = (PairsFile(path=path, held_out_fraction=0.25, data_seed=s) for s in (0, 1))
    assert set(task.eval_prompts()) != set(other.eval_prompts())
    write_pairs([make(f"prompt {i % 80}", i) for i in range(160, 0, -1)], tmp_path / "more.jsonl")
    more = PairsFile(path=str(tmp_path / "more.jsonl"), held_out_fraction=0.25)
    assert set(task.eval_prompts()) == set(more.eval_prompts()) & {p.prompt for p in MANY}


@pytest.mark.parametrize(("num_prompts", "whole"), [(1, False), (9, False), (10, True)])
def test_of_fewer_than_ten_prompts_pairs_are_held_out_each_by_itself(num_prompts, whole):
    pairs = [make(f"prompt {i % num_prompts}", i) for i in range(200)]
    train, held_out = hold_out(pairs, fraction=0.3, salt="0", prompt_of=lambda pair: pair.prompt)
    assert sorted(train + held_out) == sorted(pairs)
    shared = {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
    assert (not shared) == whole
    if not whole:  # four standard errors of a share of 0.3 in 200
        assert len(held_out) / 200 == pytest.approx(0.3, abs=0.13)
        assert shared == {pair.prompt for pair in pairs}
    again, _ = hold_out(pairs, fraction=0.3, salt="1", prompt_of=lambda pair: pair.prompt)
    assert again != train


def test_a_user_may_name_a_file_in_the_home_folder(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(PairsFile(path="~/pairs.jsonl").pair_split().train) > 50


@pytest.mark.parametrize("count", [19, 20])
def test_too_few_pairs_are_refused(count, tmp_path):
    write_pairs(MANY[:count], tmp_path / "p.jsonl")
    task = PairsFile(path=str(tmp_path / "p.jsonl"), held_out_fraction=0.3)
    if count == 20:
        assert len(task.pair_split().train + task.pair_split().held_out) == 20
    else:
        with pytest.raises(ConfigError, match=r"^task\.path: .*p\.jsonl holds 19 pairs: .* 20$"):
            task.fingerprint()


def test_pairs_of_both_files_count_together(tmp_path):
    write_pairs(MANY[:15], tmp_path / "train.jsonl")
    write_pairs(MANY[15:20], tmp_path / "test.jsonl")
    assert len(PairsFile(path=str(tmp_path)).pair_split().held_out) == 5


def test_a_split_that_leaves_no_pairs_to_train_on_is_refused(path):
    expected = r"^task\.path: .* leaves no pairs to train on: change task\.held_out_fraction="
    with pytest.raises(ConfigError, match=expected):
        PairsFile(path=path, held_out_fraction=1 - 1e-6).fingerprint()
    assert len(PairsFile(path=path, held_out_fraction=1e-6).eval_prompts()) == 1


@pytest.mark.parametrize("first_has", [True, False])
def test_rewards_of_some_pairs_alone_are_refused(first_has, tmp_path):
    given = [pair._replace(chosen_reward=2.0, rejected_reward=1.0) for pair in MANY[:30]]
    rows = given[:21] + MANY[21:30] if first_has else MANY[:21] + given[21:]
    write_pairs(rows[:20], tmp_path / "train.jsonl")
    write_pairs(rows[20:], tmp_path / "test.jsonl")
    found = ("no chosen_reward where earlier rows have them" if first_has
             else "a chosen_reward where earlier rows have none")  # fmt: skip
    with pytest.raises(ConfigError, match=rf"^task\.path: .*test\.jsonl, row 2 has {found}: give"):
        PairsFile(path=str(tmp_path)).fingerprint()


def test_what_an_earlier_step_will_make_has_no_fingerprint_yet():
    assert PairsFile(path="artifact:preferences").fingerprint() == ""


def test_the_file_is_read_once(path, tmp_path):
    task = PairsFile(path=path)
    digest, split = task.fingerprint(), task.pair_split()
    write_pairs(MANY[:40], tmp_path / "pairs.jsonl")
    assert (task.fingerprint(), task.pair_split()) == (digest, split)
    assert PairsFile(path=path).fingerprint() != digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"prompt": "\\ud800", "chosen": " a"', r"field prompt is not Unicode text \("),
        (
            '"prompt": "p", "chosen": " a", "rejected_reward": 1, "chosen_reward": 1' + "0" * 400,
            r"field chosen_reward is 1000.*: give a finite number$",
        ),
    ],
    ids=["half a character", "a number beyond floats"],
)
def test_json_that_is_no_text_or_number_here_is_refused(text, message, tmp_path):
    (tmp_path / "f.jsonl").write_text(f'{{"rejected": " b", {text}}}\n')
    with pytest.raises(ConfigError, match=rf"f\.jsonl, row 1, {message}"):
        [*read_pairs(tmp_path / "f.jsonl")]


def test_the_ending_is_read_whatever_its_case(tmp_path):
    table(tmp_path / "f.PARQUET", [ROW])
    assert [pair.chosen for _, pair in read_pairs(tmp_path / "f.PARQUET")] == [" good"]


def test_splits_of_a_split_with_another_salt_are_independent():
    items = [f"prompt {i}" for i in range(2000)]
    _, held_out = hold_out(items, fraction=0.1, salt="0", prompt_of=str)
    again, rest = hold_out(held_out, fraction=0.5, salt="stop 0", prompt_of=str)
    assert min(len(again), len(rest)) > 0.35 * len(held_out)
    assert hold_out(held_out, fraction=0.5, salt="0", prompt_of=str).train == ()


def test_held_out_pairs_whose_prompt_is_trained_on_are_counted():
    train = tuple(Pair(p, " a", " b") for p in ("p", "q"))
    held_out = tuple(Pair(p, " c", " d") for p in ("q", "r", "q"))
    assert num_shared(Split(train, held_out)) == 2
    assert num_shared(Split(train, held_out[1:2])) == 0

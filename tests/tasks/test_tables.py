"""Tables: every format gives the same rows, and what is wrong with one is said in a line or two."""

import csv
import json
import logging
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from pyarrow import parquet

from rlhf_exp.machine.network import reachable, responds
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.tables import CHUNK, READERS, Source, Table, read_table

ROWS = [{"prompt": "a b", "label": 1}, {"prompt": "c, d", "label": 2}, {"prompt": "é", "label": 3}]
NAMELESS = "http://127.0.0.1:9"  # where nothing listens


def read(path, **options) -> Table:
    return read_table(Source(path=str(path), **options))


def rows(table: Table) -> list:
    return [row for _, row in table.rows(range(table.num_rows))]


def numbers(table: Table) -> list[int]:
    return [number for number, _ in table.rows(range(table.num_rows))]


def lines(*objects) -> str:
    return "".join(json.dumps(each) + "\n" for each in objects)


def write(file: Path, contents: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return file


def write_as(ending: str, folder: Path) -> Path:
    file = folder / f"data{ending}"
    if ending in (".jsonl", ".json"):
        return write(file, lines(*ROWS) if ending == ".jsonl" else json.dumps(ROWS, indent=1))
    if ending == ".parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), file)
        return file
    if ending == ".txt":
        return write(file, "".join(f"{row['prompt']}\n" for row in ROWS))
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, ROWS[0], delimiter="\t" if ending == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)
    return file


@pytest.fixture
def offline(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", NAMELESS)
    reachable.cache_clear()
    responds.cache_clear()
    yield
    reachable.cache_clear()
    responds.cache_clear()


# Files


@pytest.mark.parametrize("ending", READERS)
@pytest.mark.parametrize("upper", [False, True])
def test_every_format_gives_the_same_rows(tmp_path, ending, upper):
    file = write_as(ending, tmp_path)
    file = file.rename(file.with_suffix(ending.upper())) if upper else file
    table = read(file)
    expected = [{"text": row["prompt"]} for row in ROWS] if ending == ".txt" else ROWS
    assert rows(table) == expected
    assert table.column_names == tuple(expected[0])
    assert table.num_rows == 3
    assert numbers(table) == [1, 2, 3]
    assert list(table.rows([2, 0])) == [(3, expected[2]), (1, expected[0])]


@pytest.mark.parametrize("ending", READERS)
def test_a_slice_of_a_file_keeps_the_numbers_of_the_rows(tmp_path, ending):
    file = write_as(ending, tmp_path)
    every = rows(read(file))
    table = read(file, split="train[1:]")
    assert (rows(table), numbers(table)) == (every[1:], [2, 3])
    table = read(file, split="train[2:]+train[:1]")
    assert (rows(table), numbers(table)) == ([every[2], every[0]], [3, 1])


def test_a_home_directory_is_meant_by_a_tilde(tmp_path, monkeypatch):
    write_as(".jsonl", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows(read("~/data.jsonl")) == ROWS


def test_rows_are_decoded_in_parts_and_in_any_order(tmp_path):
    count = 2 * CHUNK + 7
    parquet.write_table(pa.table({"n": list(range(count))}), tmp_path / "a.parquet")
    table = read(tmp_path / "a.parquet")
    order = [(7 * i) % count for i in range(count)]
    assert [row["n"] for _, row in table.rows(order)] == order
    assert [number for number, _ in table.rows(order)] == [i + 1 for i in order]
    assert list(table.rows([])) == []


def test_the_row_of_a_line_is_its_number_though_lines_are_blank(tmp_path):
    contents = "a\n\n  \nb \r\n\u2028\n c\u2028d\x85\n"
    table = read(write(tmp_path / "a.txt", contents))
    assert [row["text"] for row in rows(table)] == ["a", "b ", " c\u2028d\x85"]
    assert numbers(table) == [1, 4, 6]
    table = read(write(tmp_path / "a.jsonl", '\n{"n": 1}\r\n \n\n{"n": 2}'))
    assert rows(table) == [{"n": 1}, {"n": 2}]
    assert numbers(table) == [2, 5]
    assert numbers(read(tmp_path / "a.jsonl", split="train[1:]")) == [5]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, ending):
    file = write_as(ending, tmp_path)
    plain = rows(read(file))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert rows(read(file)) == plain


def test_json_keeps_what_datasets_would_change(tmp_path):
    given = [
        {"prompt": "2020-01-01", "x": 1, "messages": [{"role": "user", "content": "a"}]},
        {"prompt": "2020-01-02T10:00:00", "x": "text", "y": [1, {"z": None}]},
        {"prompt": "b\u2028c", "messages": [{"role": "user", "content": "b", "name": "c"}]},
    ]
    table = read(write(tmp_path / "a.jsonl", lines(*given)))
    names = ("prompt", "x", "messages", "y")
    assert table.column_names == names
    assert rows(table) == [{name: row.get(name) for name in names} for row in given]
    assert rows(read(write(tmp_path / "a.json", json.dumps(given)))) == rows(table)
    listed = "\n " + json.dumps(given, indent=2, ensure_ascii=False)
    assert rows(read(write(tmp_path / "b.jsonl", listed))) == rows(table)
    raw = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in given)
    assert "\u2028" in raw
    assert rows(read(write(tmp_path / "c.jsonl", raw))) == rows(table)


def test_a_csv_file_has_numbers_and_the_texts_that_are_asked_for(tmp_path):
    contents = (
        "prompt,n,x,flag,code,empty,big\n"
        'NA,1,0.5,True,007,,12345678901234567890123\n"null, or ""so""\nnext",2,,False,1e3,,1\n'
        "123,3,2,True,x,,1\n"
    )
    table = read(write(tmp_path / "a.csv", contents), text_columns=("prompt", "absent"))
    names = ("prompt", "n", "x", "flag", "code", "empty", "big")
    assert table.column_names == names
    expected = [
        ("NA", 1, 0.5, True, "007", None, 12345678901234567890123),
        ('null, or "so"\nnext', 2, None, False, "1e3", None, 1),
        ("123", 3, 2.0, True, "x", None, 1),
    ]
    assert [tuple(row.values()) for row in rows(table)] == expected
    kinds = [type(value) for value in rows(table)[0].values()]
    assert kinds == [str, int, float, bool, str, type(None), int]
    assert [row["prompt"] for row in rows(read(tmp_path / "a.csv"))] == [
        "NA",
        'null, or "so"\nnext',
        "123",
    ]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["12", "", "3"], [12, None, 3]),
        (["12", "NA", "-3"], [12, None, -3]),
        (["True", "", "false"], [True, None, False]),
        (["1", "", "2.5", "1e3"], [1.0, None, 2.5, 1000.0]),
        (["yes", "NA", "", "null", "None"], ["yes", "NA", "", "null", "None"]),
        (["007", "012"], ["007", "012"]),
        (["7", "012"], ["7", "012"]),
        (["NA", "NA"], ["NA", "NA"]),
        (["", ""], [None, None]),
        (["1", "x"], ["1", "x"]),
        (["1", "1e400"], ["1", "1e400"]),
        (["2020-01-01", "1_000", " 1", "inf"], ["2020-01-01", "1_000", " 1", "inf"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_a_gap_changes_no_type_and_texts_stay_texts(tmp_path, ending, cells, expected):
    separator = "," if ending == ".csv" else "\t"
    contents = "".join(f"a{separator}{cell}\n" for cell in ["n", *cells])
    contents = contents.replace("a", "prompt", 1)
    values = [row["n"] for row in rows(read(write(tmp_path / f"a{ending}", contents)))]
    assert [(type(v), v) for v in values] == [(type(v), v) for v in expected]


def test_the_files_of_a_directory_have_the_types_of_a_single_one(tmp_path):
    contents = "prompt,n,label\n12,1,NA\n7,,x\n,3,\n"
    single = rows(read(write(tmp_path / "a.csv", contents), text_columns=("prompt",)))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.csv", contents)
    assert single[1] == {"prompt": "7", "n": None, "label": "x"}
    assert rows(read(tmp_path / "folder", text_columns=("prompt",))) == single


def test_csv_rows_are_counted_below_the_header_without_blank_lines(tmp_path):
    contents = 'prompt,n\r\n\r\n"a\r\nb",1\r\n\r\nc,2\r\n'
    table = read(write(tmp_path / "a.csv", contents))
    assert rows(table) == [{"prompt": "a\r\nb", "n": 1}, {"prompt": "c", "n": 2}]
    assert numbers(table) == [1, 2]
    one = read(write(tmp_path / "b.csv", 'prompt\na\n""\n  \n\nb\n'), text_columns=("prompt",))
    assert [row["prompt"] for row in rows(one)] == ["a", "", "  ", "b"]


def test_the_lines_of_a_csv_file_may_end_as_they_did_on_old_computers(tmp_path):
    table = read(write(tmp_path / "a.csv", 'prompt,n\ra,1\r"b\rc",2\r'))
    assert rows(table) == [{"prompt": "a", "n": 1}, {"prompt": "b\rc", "n": 2}]


def test_a_column_of_numbers_and_one_text_is_of_texts_from_the_beginning(tmp_path):
    # Wide enough that pandas would read it in parts of 2048 rows, each with a type of its own.
    given, others = [*map(str, range(2100)), "x"], 300
    header = ",".join(["n", *(f"c{i}" for i in range(others))])
    contents = "\n".join([header, *(value + ",1" * others for value in given)])
    table = read(write(tmp_path / "a.csv", contents))
    assert [row["n"] for row in rows(table)] == given
    assert rows(table)[0]["c7"] == 1


def test_a_tab_separated_file_holds_commas(tmp_path):
    table = read(write(tmp_path / "a.tsv", 'prompt\tn\na, "b"\t1\n"c\td"\t2\n'))
    assert rows(table) == [{"prompt": 'a, "b"', "n": 1}, {"prompt": "c\td", "n": 2}]


def test_a_long_field_is_read_and_the_limit_of_others_is_left_alone(tmp_path):
    before = csv.field_size_limit()
    text = "x" * (before + 10)
    assert rows(read(write(tmp_path / "a.csv", f"prompt\n{text}\n"))) == [{"prompt": text}]
    with pytest.raises(ConfigError):
        read(write(tmp_path / "b.csv", 'prompt\n"a\n'))
    assert csv.field_size_limit() == before


def test_a_folder_that_is_named_like_a_value_adds_no_column(tmp_path):
    folder = tmp_path / "lang=en"
    folder.mkdir()
    assert read(write_as(".parquet", folder)).column_names == ("prompt", "label")


def test_parquet_keeps_nested_messages(tmp_path):
    given = [
        {"messages": [{"role": "user", "content": "a", "tool_calls": None}]},
        {"messages": [{"role": "user", "content": "b", "tool_calls": None}] * 2},
    ]
    parquet.write_table(pa.Table.from_pylist(given), tmp_path / "a.parquet")
    assert rows(read(tmp_path / "a.parquet")) == given


# What is wrong with a file


BROKEN = {
    "a.jsonl": (lines({"n": 1}) + "\n{oops}\n", r"a\.jsonl, row 3 is not JSON \(Expecting prop"),
    "b.jsonl": ('{"n": 1}\n[1]\n"a"\n', r"b\.jsonl, row 2 is \[1\]; give an object: {\"prompt\""),
    "c.jsonl": (b'{"n": 1}\n{"n": "caf\xe9"}\n', r"c\.jsonl, line 2 is not UTF-8; save"),
    "d.jsonl": ("", r"d\.jsonl holds no rows; give at least one$"),
    "e.jsonl": ("\n \n", r"e\.jsonl holds no rows"),
    "f.jsonl": ('{\n "n": 1\n}', r"f\.jsonl, row 1 is not JSON .*; give one object a line, or one"),
    "g.jsonl": ('{"n": %s}' % ("9" * 5000), r"g\.jsonl, row 1 is not JSON \(Exceeds the limit"),
    "h.jsonl": ('{"n": %s' % ("[" * 100_000), r"h\.jsonl, row 1 is not JSON \(maximum recursion"),
    "a.json": ('[{"n": 1},\n{"n": 2]', r"a\.json is not JSON \(Expecting ',' del.*line 2 column 8"),
    "b.json": ("[]", r"b\.json holds no rows"),
    "c.json": ('["a", "b"]', r"c\.json, row 1 is 'a'; give an object"),
    "d.json": ('[{"n": 1}, 2]', r"d\.json, row 2 is 2; give an object"),
    "a.csv": (
        "prompt,n\na,1\nb,2,3\n",
        r"a\.csv, row 2 has 3 fields where the header has 2; put a",
    ),
    "b.csv": ("prompt,n\na,1\n\nb\n", r"b\.csv, row 2 has 1 fields where the header has 2"),
    "c.csv": ("prompt,n\na,1,x\nb,2,y\n", r"c\.csv, row 1 has 3 fields where the header has 2"),
    "d.csv": ('prompt,n\na,1\n"b,2\n', r"d\.csv, row 2 is not quoted correctly \(unexpected e"),
    "e.csv": ('prompt,n\n"a" b,1\n', r"e\.csv, row 1 is not quoted correctly \(',' expected"),
    "f.csv": ("prompt,n\n", r"f\.csv holds no rows"),
    "g.csv": ("prompt,n", r"g\.csv holds no rows"),
    "h.csv": ("", r"h\.csv holds no rows"),
    "i.csv": ("a,b,a\n1,2,3\n", r"i\.csv has the header 'a, b, a'; give each column a different"),
    "j.csv": (
        "a,,b\n1,2,3\n",
        r"j\.csv has the header 'a, , b'; give each column a different name",
    ),
    "semicolons.csv": (
        "prompt;n\na;1\n",
        r"columns by semicolons, not by commas: save it with com",
    ),
    "quotes.csv": ('"prompt";"n"\n"a, b";1\n', r"quotes\.csv separates its columns by semicolons"),
    "tabs.csv": ("\nprompt\tn\na, b\t1\n", r"by tabs, not by commas: .*, or with tabs as \.tsv$"),
    "commas.tsv": ("prompt,n\na,1\n", r"\.tsv separates its columns by commas, not by tabs: save"),
    "k.csv": (b"prompt\na\nb\ncaf\xe9\n", r"k\.csv, line 4 is not UTF-8"),
    "l.csv": ('"prompt\n', r"l\.csv, row 1 is not quoted"),
    "a.tsv": ("prompt\tn\na\tb\t1\n", r"a\.tsv, row 1 has 3 fields .* holds '\\t' into quotes"),
    "a.txt": (b"a\n\xff\xfeb\n", r"a\.txt, line 2 is not UTF-8"),
    "b.txt": ("\n\n \n", r"b\.txt holds no rows"),
    "a.parquet": ("nope", r"a\.parquet cannot be read as Parquet: .*4 bytes"),
    "b.parquet": ("", r"b\.parquet cannot be read as Parquet: .*0 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_the_row_and_the_fix(tmp_path, capfd, name):
    contents, message = BROKEN[name]
    file = write(tmp_path / name, contents)
    with pytest.raises(ConfigError, match=message) as caught:
        read(file)
    text = str(caught.value)
    assert text.startswith(f"task.path: {file}")
    assert text.count("\n") == 0
    assert len(text) < len(str(file)) + 200
    assert capfd.readouterr() == ("", "")
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_a_parquet_file_without_rows_is_empty(tmp_path):
    parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet holds no rows"):
        read(tmp_path / "a.parquet")


def test_a_column_that_cannot_be_decoded_is_named(tmp_path):
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    table = datasets.Dataset.from_dict(
        {"prompt": ["a"], "image": [{"bytes": b"none", "path": None}]}, features=features
    )
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"^task\.path: rows of .*a\.parquet cannot be read: "):
        rows(read(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["a.xlsx", "README", "a.jsonl.gz", ".jsonl"])
def test_an_unknown_ending_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"unknown ending; use one of \.jsonl, \.json, \.parquet"):
        read(write(tmp_path / name, "x"))


@pytest.mark.parametrize(
    "path",
    ["{}/a.jsonl", "{}/a", "./a", "../a", "~/none", "a.jsonl", "a.CSV", "a/b/c", "a b", "é?"],
)
def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, path, offline):
    given = path.format(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read(given)
    assert str(caught.value) == (
        f"task.path={given}: no such file or directory, and not a name on the hub"
    )


def test_what_is_neither_a_file_nor_a_directory_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")  # of which a reader waits for a writer
    with pytest.raises(ConfigError, match=r"a\.jsonl: no such file or directory"):
        read(tmp_path / "a.jsonl")


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    if os.geteuid():
        write_as(".jsonl", tmp_path).rename(file).chmod(0)
    else:  # root may read every file, but this one not from its start
        file.symlink_to("/proc/self/mem")
    with pytest.raises(ConfigError, match=rf"^task\.path: cannot read {file} \([A-Z][a-z/ ]+\)$"):
        read(file)


@pytest.mark.parametrize("split", ["test", "all", "train[:x]", "train[0]", "train[:300%]", " "])
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_split_that_there_is_not_is_refused_with_those_that_there_are(tmp_path, split, ending):
    with pytest.raises(ConfigError) as caught:
        read(write_as(ending, tmp_path), split=split)
    assert str(caught.value) == (
        f"task.split={split}: {tmp_path / 'data'}{ending} has no such split; it has train, and"
        " slices such as train[:1000]"
    )


def test_a_slice_without_rows_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.jsonl holds no rows in train\[3:\]; give at"):
        read(write_as(".jsonl", tmp_path), split="train[3:]")


def test_files_have_no_subsets_and_no_revisions(tmp_path):
    file = write_as(".jsonl", tmp_path)
    for name in ("subset", "revision"):
        with pytest.raises(ConfigError) as caught:
            read(file, **{name: "main"})
        assert str(caught.value) == (
            f"task.{name}=main: {file} is a file, which has none; set it null"
        )


# Directories


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "data/train.jsonl", lines({"n": 1}, {"n": 2}, {"n": 3}))
    write(tmp_path / "data/test.jsonl", lines({"n": 4}))
    return tmp_path / "data"


def test_a_directory_has_the_splits_that_its_files_are_named_for(folder):
    assert rows(read(folder)) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert rows(read(folder, split="test")) == [{"n": 4}]
    table = read(folder, split="train[1:]+test")
    assert rows(table) == [{"n": 2}, {"n": 3}, {"n": 4}]
    assert numbers(table) == [2, 3, 1]
    for split in ("validation", "train[x]"):
        with pytest.raises(ConfigError) as caught:
            read(folder, split=split)
        assert str(caught.value) == (
            f"task.split={split}: {folder} has no such split; it has train, test, and slices such"
            " as train[:1000]"
        )
    with pytest.raises(ConfigError, match=r"holds no rows in test\[1:\]; give"):
        read(folder, split="test[1:]")


def test_a_directory_that_is_named_like_a_reader_is_a_directory(folder, monkeypatch):
    write(folder.with_name("test.jsonl"), lines({"n": 5}))
    folder.rename(folder.with_name("json"))
    monkeypatch.chdir(folder.parent)
    assert rows(read("json", split="test")) == [{"n": 4}]


def test_a_changed_file_of_a_directory_is_read_anew(folder):
    file = folder / "train.jsonl"
    assert rows(read(folder)) == [{"n": 1}, {"n": 2}, {"n": 3}]
    before = file.stat()
    file.write_text(lines({"n": 7}, {"n": 8}, {"n": 9}))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert rows(read(folder)) == [{"n": 7}, {"n": 8}, {"n": 9}]


def test_reading_leaves_nothing_behind(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    enable_progress_bars()  # whatever a run in this process has left behind
    disabled = logging.root.manager.disable
    table = read(folder)
    assert rows(table) == [{"n": 1}, {"n": 2}, {"n": 3}]
    with pytest.raises(ConfigError):
        read(folder, split="none")
    assert sorted(each.name for each in tmp_path.rglob("*")) == [
        "data",
        "test.jsonl",
        "train.jsonl",
    ]
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == disabled
    assert not are_progress_bars_disabled()


def test_a_user_who_wants_progress_bars_is_not_warned_of_them(folder, monkeypatch):
    bars = sys.modules["huggingface_hub.utils.tqdm"]  # whose name is also that of a class in it
    monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    assert rows(read(folder, split="test")) == [{"n": 4}]


@pytest.mark.parametrize(
    ("name", "contents", "reason"),
    [
        ("train.jsonl", '{"n": 1}\n{oops}\n', "JSON parse error"),
        ("train.jsonl", "", "it holds an empty file"),
        ("train.parquet", "nope", "Parquet file size is 4 bytes"),
        ("train.py", "nope", "No (supported) data files found"),
        (".hidden", "", "doesn't contain any data files"),
    ],
)
def test_what_datasets_cannot_read_is_refused(tmp_path, capfd, name, contents, reason):
    write(tmp_path / "data" / name, contents)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "data")
    first, second = str(caught.value).split("\n")
    assert first == (
        f"task.path={tmp_path / 'data'} cannot be read: `datasets` reads folders of .jsonl, .json,"
        " .parquet, .csv or .txt files."
    )
    assert reason in second
    assert capfd.readouterr() == ("", "")


def test_columns_that_differ_between_files_are_shown(tmp_path):
    write(tmp_path / "data/train-0.jsonl", lines({"n": 1}))
    write(tmp_path / "data/train-1.jsonl", lines({"n": 1, "m": 2}))
    with pytest.raises(ConfigError, match=r"\n  Couldn't cast .* because column names don't match"):
        read(tmp_path / "data")


def test_a_directory_has_subsets_if_its_card_says_so(tmp_path):
    card = """\
        ---
        configs:
        - config_name: en
          data_files: en.jsonl
        - config_name: de
          data_files: de.jsonl
        ---
        """
    write(tmp_path / "README.md", textwrap.dedent(card))
    write(tmp_path / "en.jsonl", lines({"n": 1}))
    write(tmp_path / "de.jsonl", lines({"n": 2}))
    assert rows(read(tmp_path, subset="de")) == [{"n": 2}]
    with pytest.raises(ConfigError, match=rf"^task\.subset=null: {tmp_path}: .*'en', 'de'"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=rf"^task\.subset=fr: {tmp_path}: .*'en', 'de'"):
        read(tmp_path, subset="fr")
    with pytest.raises(ConfigError, match=r"^task\.revision=main is for names on the hub; .* is a"):
        read(tmp_path, subset="en", revision="main")


# The hub


@pytest.mark.parametrize("name", ["org/none-of-this-name", "none_of.this-name"])
def test_a_hub_that_is_out_of_reach_is_found_out_at_once(offline, capfd, name):
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        read(name)
    assert time.monotonic() - start < 2
    first, second = str(caught.value).split("\n")
    assert first == (
        f"task.path={name} cannot be read: {NAMELESS} is out of reach, and it is not in the local"
        " cache; name a file or a directory."
    )
    assert name in second
    assert capfd.readouterr() == ("", "")
    assert not datasets.config.HF_HUB_OFFLINE


def test_nothing_is_asked_for_where_the_user_is_offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HTTPS_PROXY", NAMELESS)  # with which the hub counts as reachable
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set, and it is not in the local"):
        read("org/none-of-this-name")
    assert datasets.config.HF_HUB_OFFLINE


HUB = '''
import http.server, json, logging, os, sys, tempfile, threading, time

SHA, DATA = "0123456789abcdef" * 2 + "01234567", b'{"n": 1}\\n{"n": 2}\\n'


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as `datasets` asks for: one dataset of one file."""

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        file = {"type": "file", "path": "train.jsonl", "size": len(DATA), "oid": "a" * 40}
        about = {"id": "org/name", "sha": SHA, "siblings": [{"rfilename": "train.jsonl"}],
                 "private": False, "gated": False, "tags": [], "downloads": 0, "likes": 0}
        if self.path.startswith("/api/datasets/org/name/tree/"):
            self.reply(200, json.dumps([file]).encode())
        elif self.path.startswith("/api/datasets/org/name"):
            self.reply(200, json.dumps(about).encode())
        elif self.path.startswith("/datasets/org/name/resolve/"):
            if self.path.endswith("/README.md") and "/v2/" not in self.path:
                self.reply(200, b"A card.", ETag='"card"', X_Repo_Commit=SHA)
            elif "/v2/" in self.path:
                self.reply(404, X_Error_Code="RevisionNotFound")
            elif self.path.endswith("/train.jsonl"):
                self.reply(200, DATA, ETag='"data"', X_Repo_Commit=SHA)
            else:
                self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
        else:
            self.reply(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


def attempt(name, **options):
    start = time.monotonic()
    try:
        table = read_table(Source(path=name, **options))
        result = list(table.rows(range(table.num_rows)))
    except ConfigError as error:
        result = str(error)
    return result, time.monotonic() - start


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": sys.argv[1]}
os.environ["TQDM_POSITION"] = "-1"  # bars even where stderr is no terminal
logging.basicConfig(level=logging.INFO)

from rlhf_exp.machine.network import reachable, responds
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.tables import Source, read_table

given = [{}, {"split": "train[1:]"}, {"split": "test"}, {"subset": "fr"}, {"revision": "v1"}]
results = [attempt("org/name", **options) for options in given]
results += [attempt("org/name", revision="v2"), attempt("org/other")]
server.shutdown()
server.server_close()
reachable.cache_clear()
responds.cache_clear()
given = [{}, {"revision": "main"}, {"revision": SHA}, {"revision": "v2"}, {"split": "test"}]
results += [attempt("org/name", **options) for options in given] + [attempt("org/other")]
print(json.dumps([os.environ["HF_ENDPOINT"], results]))
'''


def test_a_dataset_of_the_hub_is_read_and_found_again_without_it(tmp_path):
    # In a process of its own, as the hub's address is read while `datasets` is imported.
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(tmp_path)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hub, answers = json.loads(done.stdout)
    results, seconds = zip(*answers, strict=True)
    every, sha = [[1, {"n": 1}], [2, {"n": 2}]], "0123456789abcdef" * 2 + "01234567"
    no_test = (
        "task.split=test: org/name has no such split; it has train, and slices such as train[:1000]"
    )
    assert results[:3] == (every, every[1:], no_test)
    assert results[3] == (
        "task.subset=fr: org/name: BuilderConfig 'fr' not found. Available: ['default']"
    )
    assert results[4] == every
    assert results[5] == (
        f"task.path=org/name cannot be read: check the name on {hub}/datasets, or name a file.\n"
        "  Revision 'v2' doesn't exist for dataset 'org/name' on the Hub."
    )
    assert results[6] == (
        f"task.path=org/other cannot be read: check the name on {hub}/datasets, or name a file.\n"
        "  Dataset 'org/other' doesn't exist on the Hub or cannot be accessed."
    )
    assert results[7:10] == (every, every, every)
    assert results[10] == (
        f"task.revision=v2: {hub} is out of reach, and the local cache holds {sha}; set that, or"
        " null"
    )
    assert results[11] == no_test
    assert results[12].startswith(f"task.path=org/other cannot be read: {hub} is out of reach, and")
    assert max(seconds[7:]) < 2
    assert set(done.stderr.splitlines()) == {
        f"INFO:rlhf_exp.tasks.tables:task.path: reading org/{name} from {hub} or its local cache"
        for name in ("name", "other")
    }

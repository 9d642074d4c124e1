import json

import pytest

from rlhf_exp.runs.samples import encodable, read_ends, read_samples
from tests.report.build_runs import samples, write_lines


def read(path):
    problems = []
    found = read_samples(path, problems)
    return found, problems


@pytest.mark.parametrize("count", [3, 64, 2000])
def test_the_first_and_last_completions_of_the_same_prompts(tmp_path, count):
    path = tmp_path / "samples.jsonl"
    written = samples([0, 10, 20], count=count)
    write_lines(path, written)
    found, problems = read(path)
    assert problems == []
    assert [(s.prompt, s.before, s.after, s.score_before, s.score_after) for s in found] == [
        (old["prompt"], old["completion"], new["completion"], 0.5, 0.9)
        for old, new in list(zip(written, written[2 * count :], strict=False))[:8]
    ]


def test_all_rows_of_both_ends(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = samples([0, 25, 40], count=20)
    rows[3]["completion"] = " is\u2028it\x85"  # JSON leaves these separators of lines in a text
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    assert read_ends(path) == (rows[:20], rows[40:])


def test_one_evaluation_has_no_after(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_lines(path, samples([0], count=2))
    found, _ = read(path)
    assert [(s.after, s.score_after) for s in found] == [(None, None)] * 2


def test_rows_with_faults_are_left_out(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = samples([0, 1], count=2)
    rows[0]["score"] = None
    rows[2]["score"] = 10**400
    lines = [json.dumps(row).encode() for row in rows]
    junk = [b"\xff\xfe", b"[1]", b'{"phase": 0, "prompt": 3, "completion": "x"}']
    path.write_bytes(b"\n".join([*junk, *lines[:2], *lines[2:], b'{"phase": 1, "pro']))
    found, problems = read(path)
    assert problems == []
    assert [(s.score_before, s.score_after) for s in found] == [(None, None), (0.5, 0.9)]


def test_other_prompts_at_the_end_are_not_put_beside_the_first(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = samples([0, 1], count=2)
    rows[2]["prompt"] = "another"
    write_lines(path, rows)
    found, _ = read(path)
    assert [s.prompt for s in found] == [rows[1]["prompt"]]


def test_no_file_is_no_problem_and_rubbish_is_one(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert read(path) == ([], [])
    path.write_bytes(b"\x00" * 300_000)
    assert read(path) == ([], [f"{path}: no sample in it that can be read"])


def test_what_utf8_cannot_hold_is_replaced(tmp_path):
    assert encodable("a\ud800b é") == "a?b é"
    path = tmp_path / "samples.jsonl"
    path.write_text('{"phase": 0, "prompt": "p", "completion": "\\udc80"}\n', encoding="utf-8")
    assert read(path)[0][0].before == "?"

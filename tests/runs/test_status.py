"""What a folder says about its job, whatever state its files are in."""

import json

import pytest

from rlhf_exp.runs.status import TAIL, JobState, is_done, read_state
from tests.sweeps.build_jobs import write_rows, write_status

ROWS = [
    {"phase": 0, "eval/score": 0.2, "eval/kl": 0.0},
    {"phase": 1, "objective/scores": 0.3, "objective/kl": 0.01},
    {"phase": 2, "objective/scores": 0.4, "objective/kl": 0.02},
]


def test_a_folder_that_is_not_there_waits(tmp_path):
    assert read_state(tmp_path / "nothing") == JobState(status="waiting")
    assert read_state(tmp_path) == JobState(status="waiting")


def test_a_run_has_the_score_of_its_newest_phase(tmp_path):
    write_status(tmp_path, "running")
    assert read_state(tmp_path) == JobState(status="running")
    write_rows(tmp_path, ROWS)
    assert read_state(tmp_path) == JobState(status="running", phase=2, score=0.4, kl=0.02)
    # An evaluation on the way is of other samples than the rows around it.
    write_rows(tmp_path, [*ROWS, {"phase": 2, "eval/score": 0.9, "eval/kl": 0.8}])
    assert read_state(tmp_path) == JobState(status="running", phase=2, score=0.4, kl=0.02)


def test_a_run_that_is_done_has_the_score_of_its_last_evaluation(tmp_path):
    write_status(tmp_path, "done")
    write_rows(
        tmp_path,
        [
            *ROWS,
            {"phase": 2, "eval/score": 0.8, "eval/kl": 0.1},
            {"phase": 3, "objective/scores": 0.6, "objective/kl": 0.7},
        ],
    )
    assert read_state(tmp_path) == JobState(status="done", phase=3, score=0.8, kl=0.1)


def test_a_run_without_evaluations_has_the_score_of_its_last_phase_when_done(tmp_path):
    write_status(tmp_path, "done")
    write_rows(tmp_path, ROWS[1:])
    assert read_state(tmp_path) == JobState(status="done", phase=2, score=0.4, kl=0.02)


def test_a_stage_without_scores_has_none(tmp_path):
    write_status(tmp_path, "done")
    write_rows(tmp_path, [{"phase": 5, "loss": 1.0, "eval/loss": 2.0}])
    assert read_state(tmp_path) == JobState(status="done", phase=5)


def test_a_score_that_was_not_finite_is_none(tmp_path):
    write_status(tmp_path, "failed", "scores are NaN at phase 4")
    write_rows(tmp_path, [*ROWS, {"phase": 4, "objective/scores": None, "objective/kl": None}])
    assert read_state(tmp_path) == JobState(
        status="failed", error="scores are NaN at phase 4", phase=4
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"status": "do',
        b"[]",
        b"\xff\xfe\x00",
        b"null",
        b"[" * 10_000,
        b'{"status": ["done"]}',
    ],
)
def test_a_status_that_cannot_be_read_counts_as_none(tmp_path, content):
    (tmp_path / "status.json").write_bytes(content)
    assert read_state(tmp_path) == JobState(status="waiting")


def test_a_row_that_is_being_written_is_not_there_yet(tmp_path):
    write_status(tmp_path, "running")
    write_rows(tmp_path, ROWS)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        # As JSON it is whole, but the end of its line, which comes last, is missing.
        file.write('{"phase": 3, "objective/scores": 0.5}')
    assert read_state(tmp_path).phase == 2
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert (read_state(tmp_path).phase, read_state(tmp_path).score) == (3, 0.5)


def test_garbage_between_rows_is_passed_over(tmp_path):
    write_status(tmp_path, "running")
    lines = [
        b"\xff\xfe",
        b"",
        b'{"phase": 7',
        b"[1, 2]",
        b"null",
        b"[" * 5_000,
        json.dumps(ROWS[1]).encode(),
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b"\x00", b""]))
    assert read_state(tmp_path) == JobState(status="running", phase=1, score=0.3, kl=0.01)


@pytest.mark.parametrize("value", ["a", [1], True, 10**400, float("inf")])
def test_what_is_no_number_is_not_there(tmp_path, value):
    (tmp_path / "status.json").write_text('{"status": "failed", "error": 3}', encoding="utf-8")
    write_rows(tmp_path, [{"phase": value, "objective/scores": value, "objective/kl": value}])
    assert read_state(tmp_path) == JobState(status="failed")


def test_of_a_large_file_the_end_is_read(tmp_path):
    write_status(tmp_path, "done")
    early = {"phase": 0, "eval/score": 0.1, "eval/kl": 0.0, "of the first row": "é" * 200}
    rows = [{"phase": i, "objective/scores": i / 1000, "é": "é" * 80} for i in range(1, 400)]
    write_rows(tmp_path, [early, *rows])
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert size > 3 * TAIL
    # The evaluation at the beginning is out of reach, so that there is none.
    assert read_state(tmp_path) == JobState(status="done", phase=399, score=0.399)
    write_rows(tmp_path, [*rows, {**early, "phase": 400}])
    assert read_state(tmp_path) == JobState(status="done", phase=400, score=0.1, kl=0.0)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_newest_row_is_found_wherever_the_tail_begins(tmp_path, more):
    write_status(tmp_path, "running")
    last = json.dumps({"phase": 2, "objective/scores": 0.4}).encode() + b"\n"
    filler = TAIL - len(last) + more
    (tmp_path / "metrics.jsonl").write_bytes(b"x" * (filler - 1) + b"\n" + last)
    assert read_state(tmp_path) == JobState(status="running", phase=2, score=0.4)


def test_what_cannot_be_opened_counts_as_not_there(tmp_path):
    (tmp_path / "status.json").mkdir()
    (tmp_path / "metrics.jsonl").mkdir()
    assert read_state(tmp_path) == JobState(status="waiting")


def test_a_run_is_done_if_its_status_says_so(tmp_path):
    assert not is_done(tmp_path)
    for content in ("[]", "{", '{"status": "running"}', '{"status": ["done"]}', "[" * 100_000):
        (tmp_path / "status.json").write_text(content)
        assert not is_done(tmp_path)
    write_status(tmp_path, "done")
    assert is_done(tmp_path)

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.runs.folder import RunFolder, Sink
from rlhf_exp.runs.provenance import environment
from rlhf_exp.runs.status import write_status
from rlhf_exp.runs.summary import Histogram


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.samples: list[tuple[int, list[Mapping[str, Any]]]] = []
        self.histograms: list[tuple[int, dict[str, Histogram]]] = []
        self.summaries: list[dict[str, float]] = []
        self.results: list[tuple[dict[str, Any], Path]] = []
        self.closed_by: list[type[BaseException] | None] = []

    def log(self, phase: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((phase, dict(metrics)))

    def log_samples(self, phase: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.samples.append((phase, list(rows)))

    def log_histograms(self, phase: int, histograms: Mapping[str, Histogram]) -> None:
        self.histograms.append((phase, dict(histograms)))

    def log_summary(self, summary: Mapping[str, float]) -> None:
        self.summaries.append(dict(summary))

    def log_result(self, result: Mapping[str, Any], path: Path) -> None:
        self.results.append((dict(result), path))

    @contextmanager
    def open(self) -> Iterator[list["Recorder"]]:
        try:
            yield [self]
        except BaseException as error:
            self.closed_by.append(type(error))
            raise
        self.closed_by.append(None)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_nothing_is_created_before_the_first_write(tmp_path):
    recorder = Recorder()
    with RunFolder(tmp_path / "run", recorder.open) as folder:
        assert not folder.path.exists()
    assert not folder.path.exists()
    assert recorder.closed_by == []
    folder.log(1, {"a": 1.0})
    assert [path.name for path in folder.path.iterdir()] == ["metrics.jsonl"]


def test_a_start_opens_the_sinks_and_writes_status_and_environment(tmp_path):
    recorder = Recorder()
    with RunFolder(tmp_path / "run", recorder.open) as folder:
        folder.start()
        assert json.loads((folder.path / "status.json").read_text())["status"] == "running"
        folder.log(0, {"a": 1.0})
    assert (folder.path / "environment.txt").read_text().splitlines() == environment()
    assert recorder.rows == [(0, {"a": 1.0})]
    assert recorder.closed_by == [None]


def test_what_ends_the_run_reaches_the_sinks_and_the_caller(tmp_path):
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path, recorder.open) as folder:  # noqa: PT012
        folder.start()
        raise KeyboardInterrupt
    assert recorder.closed_by == [KeyboardInterrupt]


def test_metrics_are_on_disk_after_every_call(tmp_path):
    folder = RunFolder(tmp_path)
    for phase in range(3):
        folder.log(phase, {"a": phase / 8, "b/c": -1.0})
        text = (tmp_path / "metrics.jsonl").read_text()
        assert text.count("\n") == phase + 1
        assert text.endswith("\n")
    assert read_lines(tmp_path / "metrics.jsonl")[2] == {"phase": 2, "a": 0.25, "b/c": -1.0}
    assert folder.rows() == read_lines(tmp_path / "metrics.jsonl")


def test_what_is_not_finite_becomes_null_on_disk_alone(tmp_path):
    recorder = Recorder()
    with RunFolder(tmp_path, recorder.open) as folder:
        folder.start()
        folder.log(1, {"nan": math.nan, "up": math.inf, "down": -math.inf, "fine": 1.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"phase": 1, "nan": null, "up": null, "down": null, "fine": 1.5}\n'
    [(phase, seen)] = recorder.rows
    assert phase == 1
    assert math.isnan(seen["nan"])
    assert seen["down"] == -math.inf


# Characters that end a line for str.splitlines, and that JSON leaves as they are.
LINE_ENDS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \r"


def test_samples_have_their_phase_and_any_text(tmp_path):
    recorder = Recorder()
    rows = [{"prompt": f"é{LINE_ENDS}", "score": 0.5}, {"prompt": 'a "b"\n', "score": 1.0}]
    with RunFolder(tmp_path, recorder.open) as folder:
        folder.start()
        folder.log_samples(3, rows)
        folder.log_samples(4, rows[:1])
    assert read_lines(tmp_path / "samples.jsonl") == [
        {"phase": 3, **rows[0]},
        {"phase": 3, **rows[1]},
        {"phase": 4, **rows[0]},
    ]
    assert recorder.samples == [(3, rows), (4, rows[:1])]
    assert folder.rows("samples.jsonl") == read_lines(tmp_path / "samples.jsonl")


def test_a_rewind_drops_what_a_resumed_run_writes_again(tmp_path):
    folder = RunFolder(tmp_path)
    sizes = []
    for phase in (0, 1, 2, 3):
        folder.log(phase, {"a": phase / 4})
        folder.log_samples(phase, [{"text": LINE_ENDS}, {"text": "b"}])
        sizes.append(folder.sizes())
        folder.sync()
    kept = {
        name: (tmp_path / name).read_text().split("\n")
        for name in ("metrics.jsonl", "samples.jsonl")
    }
    for name in kept:
        with (tmp_path / name).open("a") as file:
            file.write('{"phase": 1, "te')  # the power went off here
    folder.rewind(sizes[2])
    assert (tmp_path / "metrics.jsonl").read_text().split("\n") == [*kept["metrics.jsonl"][:3], ""]
    assert (tmp_path / "samples.jsonl").read_text().split("\n") == [*kept["samples.jsonl"][:6], ""]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "samples.jsonl"]
    folder.log(3, {"a": 0.75})
    assert (tmp_path / "metrics.jsonl").read_text().split("\n") == kept["metrics.jsonl"]
    folder.rewind(sizes[0])
    assert [row["phase"] for row in folder.rows()] == [0]
    assert [row["phase"] for row in folder.rows("samples.jsonl")] == [0, 0]
    folder.rewind({})
    assert folder.rows() == folder.rows("samples.jsonl") == []


def test_a_rewind_tells_rows_of_one_phase_apart(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log(4, {"train/loss": 1.0})
    sizes = folder.sizes()
    folder.log(4, {"heldout/loss": 2.0})  # after the checkpoint of update 4
    folder.rewind(sizes)
    assert folder.rows() == [{"phase": 4, "train/loss": 1.0}]


@pytest.mark.parametrize("left", [None, b"", b'{"phase": 0}\n{"pha'])
def test_rows_that_were_lost_are_told_of_and_the_next_has_a_line_of_its_own(tmp_path, caplog, left):
    folder = RunFolder(tmp_path)
    folder.log(0, {"a": 1.0})
    folder.log(1, {"a": 2.0})
    sizes, file = folder.sizes(), tmp_path / "metrics.jsonl"
    file.unlink() if left is None else file.write_bytes(left)
    folder.rewind(sizes)
    assert caplog.messages == [f"{file} has lost rows: it is shorter than at the checkpoint"]
    folder.log(2, {"a": 3.0})
    assert [row["phase"] for row in folder.rows()] == ([0, 2] if left else [2])


def test_a_run_that_goes_on_elsewhere_says_where_and_keeps_where_it_began(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    folder.write_environment()
    folder.write_environment()  # nothing is new
    first = (tmp_path / "environment.txt").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["environment.txt"]
    older = first.replace("torch==", "torch==0.")
    (tmp_path / "environment.txt").write_text(older)
    folder.write_environment()
    assert (tmp_path / "environment.txt").read_text() == older
    assert (tmp_path / "environment-2.txt").read_text() == first
    assert "torch==" in caplog.messages[-1]
    folder.write_environment()
    assert not (tmp_path / "environment-3.txt").exists()
    folder.clear()
    assert not [*tmp_path.iterdir()]


def test_the_name_of_a_run_comes_back_from_its_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    folder.keep_id("abcdef12")
    assert folder.run_id == "abcdef12"
    folder.keep_id("00000000")
    assert folder.run_id == "abcdef12"


@pytest.mark.parametrize(
    ("asked", "kept"), [("My-run_1.b", True), ("x", True), ("a" * 65, False), ("a/b", False)]
)
def test_a_run_is_called_what_it_is_asked_to_be_if_that_is_an_id(tmp_path, caplog, asked, kept):
    folder = RunFolder(tmp_path)
    folder.keep_id(asked)
    assert (folder.run_id == asked) is kept
    warnings = [] if kept else [f"{asked} is no id of a W&B run; this run is {folder.run_id}"]
    assert caplog.messages == warnings


def test_a_run_has_one_name_for_good(tmp_path):
    first = RunFolder(tmp_path / "a").run_id
    assert RunFolder(tmp_path / "a").run_id == first
    assert RunFolder(tmp_path / "b").run_id != first
    (tmp_path / "a" / "run_id.txt").write_text("../../elsewhere\n")
    other = RunFolder(tmp_path / "a").run_id
    assert other.isalnum()
    assert RunFolder(tmp_path / "a").run_id == other != first


def test_histograms_have_a_row_each_and_are_rewound_too(tmp_path):
    recorder = Recorder()
    a, b = (Histogram(counts=(1, n), edges=(0.0, 0.5, 1.0)) for n in (2, 3))
    with RunFolder(tmp_path, recorder.open) as folder:
        folder.start()
        for phase in (2, 4):
            sizes = folder.sizes()
            folder.log(phase, {"x": 1.0})
            folder.log_samples(phase, [{"text": "a"}])
            folder.log_histograms(phase, {"a": a, "b": b})
    assert recorder.histograms == [(2, {"a": a, "b": b}), (4, {"a": a, "b": b})]
    assert read_lines(tmp_path / "histograms.jsonl")[:2] == [
        {"phase": 2, "name": "a", "counts": [1, 2], "edges": [0.0, 0.5, 1.0]},
        {"phase": 2, "name": "b", "counts": [1, 3], "edges": [0.0, 0.5, 1.0]},
    ]
    folder.rewind(sizes)
    assert [row["phase"] for row in folder.rows("histograms.jsonl")] == [2, 2]


def test_sinks_are_told_what_the_run_has_come_to_and_at_its_end_the_result(tmp_path):
    RunFolder(tmp_path).log(0, {"eval/score": 0.75})  # before the run was resumed
    recorder = Recorder()
    with RunFolder(tmp_path, recorder.open) as folder:
        folder.start()
        folder.log(1, {"objective/scores": 1.0})
        assert recorder.summaries == []
        folder.log(2, {"eval/score": 0.5})
        folder.log_result({"after": {}})
    best = {"best/eval_score": 0.75, "best/phase": 0, "final/eval_score": 0.5}
    assert recorder.summaries == [best]
    assert recorder.results == [({"after": {}}, tmp_path)]


class Failing(Sink):
    """A tracker whose server is gone; it ignores samples and all else."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, phase: int, metrics: Mapping[str, float]) -> None:
        self.calls += 1
        raise ConnectionError("no route\nto host")


def test_a_sink_that_fails_is_dropped_with_a_warning_and_the_others_go_on(tmp_path, caplog):
    failing, recorder = Failing(), Recorder()
    with RunFolder(tmp_path, lambda: contextlib.nullcontext([failing, recorder])) as folder:
        folder.start()
        folder.log_samples(0, [{"prompt": "p"}])
        folder.log(1, {"a": 0.5})
        folder.log(2, {"eval/score": 0.5})
    assert failing.calls == 1
    assert recorder.rows == [(1, {"a": 0.5}), (2, {"eval/score": 0.5})]
    assert len(recorder.summaries) == len(recorder.samples) == 1
    assert [row["phase"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "Failing failed (ConnectionError: no route); going on without it" in caplog.text


def test_rows_of_a_run_that_died_are_those_that_were_finished(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log(1, {"a": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": 2, "a": 0.25}')
    assert folder.rows() == [{"phase": 1, "a": 0.5}]


GLUED = b'{"phase": 1, "a": 0.{"phase": 2, "a": 0.5}'
RUBBISH = (
    GLUED,
    b"\xff\xfe\x00\x93",
    b"",
    b"[1, 2]",
    b"3",
    b'{"a": 1}',
    b'{"phase": null}',
    b"[" * 10**5,
)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "histograms.jsonl"])
def test_broken_lines_are_left_out_and_told_once(tmp_path, caplog, name):
    folder = RunFolder(tmp_path)
    good = [b'{"phase": 0, "a": 1}', b'{"phase": 1, "a": 2}', b'{"phase": 2, "a": 3}']
    (tmp_path / name).write_bytes(b"\n".join([good[0], *RUBBISH, good[1], GLUED, good[2], b""]))
    for _ in range(2):
        assert [row["a"] for row in folder.rows(name)] == [1, 2, 3]
    assert caplog.messages == [f"{tmp_path / name}: {len(RUBBISH) + 1} broken line(s) left out"]


def test_a_text_with_bytes_that_are_no_characters_is_read(tmp_path, caplog):
    (tmp_path / "samples.jsonl").write_bytes(b'{"phase": 1, "completion": "caf\xe9"}\n')
    folder = RunFolder(tmp_path)
    assert folder.rows("samples.jsonl") == [{"phase": 1, "completion": "caf\ufffd"}]
    assert caplog.messages == []


def test_json_is_replaced_whole(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_result({"score": "¡sí!"})
    path = folder.path / "result.json"
    assert path.read_text(encoding="utf-8") == '{\n  "score": "¡sí!"\n}\n'
    with path.open(encoding="utf-8") as reader:
        folder.write_result({"score": 2})
        # Whoever has the old file open goes on reading the old one.
        assert json.load(reader) == {"score": "¡sí!"}
    with pytest.raises(TypeError, match="not JSON serializable"):
        folder.write_result({"score": object()})
    assert json.loads(path.read_text()) == {"score": 2}
    assert os.listdir(folder.path) == ["result.json"]


def test_what_an_earlier_attempt_logged_is_removed_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path)
    folder.clear()
    folder.log(1, {"loss": 1.0})
    folder.log_samples(1, [{"text": "a"}])
    folder.log_histograms(1, {"scores": Histogram(edges=(0.0, 1.0), counts=(1,))})
    write_status(folder.path, "failed")
    (tmp_path / "train.log").write_text("said", encoding="utf-8")
    folder.clear()
    assert sorted(os.listdir(tmp_path)) == ["status.json", "train.log"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("done",), {"status": "done", "error": None}),
        (("failed", "phase 3: ..."), {"status": "failed", "error": "phase 3: ..."}),
    ],
)
def test_a_status_is_read_back(tmp_path, arguments, expected):
    write_status(tmp_path, *arguments)
    assert json.loads((tmp_path / "status.json").read_text()) == expected

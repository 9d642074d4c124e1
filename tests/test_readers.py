"""Readers of files under fuzz: a file is read rightly or refused by its name, and what is good of
it is not lost beside what is broken. Nothing else is raised, whatever the bytes."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.runs.reading import read_runs
from rlhf_exp.runs.samples import encodable
from rlhf_exp.runs.status import read_state
from rlhf_exp.settings import ConfigError
from rlhf_exp.sweeps.expected_time import expected_seconds, finished_runs
from rlhf_exp.sweeps.jobs import SweepJob, place, read_record, write_record
from rlhf_exp.sweeps.monitor import problems, summary
from rlhf_exp.tasks.dataset import PromptDataset
from rlhf_exp.tasks.labelled_text import LabelledTextFile
from rlhf_exp.tasks.pairs import read_pairs, write_pairs
from rlhf_exp.tasks.protocol import Pair
from rlhf_exp.tasks.tables import Source, read_table
from tests.damage import NASTY, damaged, mistyped
from tests.reliability import count_cases
from tests.report.build_runs import config, limit_points, rows, write_limit, write_run

fuzz = settings(
    derandomize=True, database=None, deadline=None, max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
counts: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    yield
    for reader, cases in counts.items():
        count_cases(f"fuzzed {reader}", cases)


def survives(reader: str, read: Callable[[], Any], file: Path) -> Any:
    """What is read, or None for a file that is refused by its name."""
    try:
        found, said = read(), ""
    except ConfigError as error:
        found, said = None, str(error)
    assert found is not None or file.name in said
    counts[reader] += 1
    return found


PAIRS = [
    Pair(f"prompt {i}", " gut \u2013 ja", " no\u2028pe", 1.5, -0.5, chosen_ended=True,
         rejected_ended=i % 2 == 0)
    for i in range(6)
]  # fmt: skip


def written_pairs(folder: Path, ending: str) -> bytes:
    write_pairs(PAIRS, folder / f"real.{ending}")
    return (folder / f"real.{ending}").read_bytes()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_pairs(ending: str, tmp_path: Path) -> None:
    real, file = written_pairs(tmp_path, ending), tmp_path / f"pairs.{ending}"

    @fuzz
    @given(st.one_of(damaged(real), mistyped(PAIRS[0]._asdict())))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        found = survives("files of pairs", lambda: [*read_pairs(file)], file)
        if found is not None and ending == "jsonl" and not content.startswith(b"["):
            lines = content.decode("utf-8-sig").split("\n")
            assert len(found) == sum(bool(line.strip()) for line in lines)

    check()


PROMPTS = [{"prompt": f"Was it good? {i}", "answer": i, "note": None} for i in range(6)]
TABLES = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in PROMPTS),
    ".json": json.dumps(PROMPTS),
    ".csv": "prompt,answer\r\n" + "".join(f'"Was it, ""{i}""?",{i}\r\n' for i in range(6)),
    ".tsv": "prompt\tanswer\n" + "".join(f"Was it {i}?\t{i}\n" for i in range(6)),
    ".txt": "".join(f"Was it {i}?\n" for i in range(6)),
}


@pytest.mark.parametrize("ending", [*TABLES, ".parquet"])
def test_tables_and_prompts(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"prompts{ending}"
    real = TABLES[ending].encode() if ending in TABLES else written_pairs(tmp_path, "parquet")

    def read() -> int:
        table = read_table(Source(path=str(file)))
        return len([*table.rows(range(table.num_rows))])

    @settings(fuzz, max_examples=150)
    @given(damaged(real))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        found = survives("tables of prompts", read, file)
        if found is not None and ending in (".jsonl", ".txt") and not content.startswith(b"["):
            lines = content.decode("utf-8-sig").split("\n")
            assert found == sum(bool(line.strip()) for line in lines)
        task = PromptDataset(path=str(file), held_out_fraction=0)
        survives("sets of prompts", task.fingerprint, file)

    check()


def test_labelled_text(tmp_path: Path) -> None:
    lines = [
        f"{'good' if i % 2 else 'bad'}\ta film \u2013 of {i} words and more" for i in range(230)
    ]
    real, file = "\n".join(["label\ttext", *lines]).encode(), tmp_path / "labelled.tsv"

    @fuzz
    @given(damaged(real))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        task = LabelledTextFile(path=str(file), held_out_fraction=0.2)
        if survives("files of labelled text", task.fingerprint, file) is not None:
            given = content.decode("utf-8-sig").rstrip("\r\n").split("\n")[1:]
            distinct = {line.partition("\t")[2].strip() for line in given}
            kept = sum(map(len, task.labelled_split()))
            assert kept + task.num_contradictory == len(distinct)

    check()


METRICS = [{"phase": i // 2, "objective/kl": 0.25, "text": "a\u2028b"} for i in range(8)]


@st.composite
def lines_and_damage(draw: st.DrawFn) -> list[tuple[bool, bytes]]:
    """Lines of metrics.jsonl, each with whether it is as it was written."""
    found = []
    for row in METRICS:
        line = json.dumps(row, ensure_ascii=False).encode()
        if draw(st.integers(0, 2)):
            found.append((True, line))
        else:
            broken = draw(st.one_of(damaged(line), mistyped(row), st.sampled_from(NASTY)))
            broken = broken.replace(b"\n", b"")
            found.append((False, broken))
    return found


def test_metrics_of_a_run_keep_every_good_row(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    logging.disable(logging.WARNING)

    @fuzz
    @given(lines_and_damage(), st.binary(max_size=30), st.integers(0, len(METRICS)))
    def check(lines: list[tuple[bool, bytes]], cut: bytes, kept: int) -> None:
        ends = [line + b"\n" for _, line in lines]
        file.write_bytes(b"".join(ends) + cut.replace(b"\n", b""))
        good = [json.loads(line) if was_written else None for was_written, line in lines]
        remaining = iter(RunFolder(tmp_path).rows())
        assert all(row in remaining for row in good if row), "all of them, in their order"
        folder = RunFolder(tmp_path)
        folder.rewind({file.name: len(b"".join(ends[:kept]))})
        folder.log(9, {"objective/kl": 0.5})
        rows = folder.rows()
        assert rows[-1] == {"phase": 9, "objective/kl": 0.5}
        assert len(rows) <= kept + 1
        remaining = iter(rows)
        assert all(row in remaining for row in good[:kept] if row)
        counts["metrics of runs"] += 1

    try:
        check()
    finally:
        logging.disable(logging.NOTSET)


def test_reports_read_any_run(tmp_path: Path) -> None:
    run = write_limit(write_run(tmp_path / "run", config(), rows(config())), limit_points())
    files = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    jsons = sorted(name for name in files if name.endswith(".json"))
    assert {"status.json", "metrics.jsonl", "limit.json"} <= files.keys()
    whole = read_runs([run])[0][0].train.phases
    first = json.loads(files["metrics.jsonl"].partition(b"\n")[0])

    @fuzz
    @given(st.data(), st.sampled_from(sorted(files)))
    def check(data: st.DataObject, name: str) -> None:
        real = files[name]
        for other, content in files.items():
            (run / other).write_bytes(content)
        kinds = [damaged(real)]
        if name in jsons:
            kinds.append(mistyped(json.loads(real)))
        elif name == "metrics.jsonl":
            kinds.append(mistyped(first).map(lambda line: line + b"\n" + real))
        (run / name).write_bytes(data.draw(st.one_of(kinds)))
        found, problems = read_runs([run])
        assert all(isinstance(problem, str) for problem in problems)
        for one in found:
            json.dumps(one.config)
            assert encodable(one.status) == one.status
            if name != "metrics.jsonl":
                assert one.train.phases == whole
        assert len(found) == 1
        counts["folders of runs"] += 1

    check()


def test_a_sweep_is_shown_whatever_its_jobs_left(tmp_path: Path) -> None:
    job = SweepJob(overrides=("seed=1",), swept=("seed=1",), identity="a", phases=4, number=0,
                   folder=tmp_path / "0_seed=1")  # fmt: skip
    job.folder.mkdir()
    row = {"phase": 4, "eval/score": 0.5, "eval/kl": 0.1, "objective/scores": 0.5}
    result = {"seconds": {"rollout": 3.0, "total": 5.0}, "after": {"eval/score": 0.5}}
    settled = {"stage": {"total_phases": 4, "batch_size": 8}, "model": {"d_model": 8}}
    reals = {"status.json": {"status": "done", "error": None}, "metrics.jsonl": row,
             "result.json": result, "resolved_config.json": settled}  # fmt: skip
    console = Console(quiet=True)
    contents = {name: json.dumps(real).encode() + b"\n" for name, real in reals.items()}

    @fuzz
    @given(st.data(), st.sampled_from(sorted(reals)))
    def check(data: st.DataObject, name: str) -> None:
        drawn = st.one_of(damaged(contents[name]), mistyped(reals[name]))
        for other, content in contents.items():
            (job.folder / other).write_bytes(content)
        (job.folder / name).write_bytes(data.draw(drawn) + b"\n")
        state = read_state(job.folder)
        assert name == "status.json" or state.status == "done"
        console.print(summary([job]))
        problems([job])
        seconds = expected_seconds(settled, finished_runs(tmp_path))
        assert seconds is None or 0 <= seconds < float("inf")
        counts["folders of jobs"] += 1

    check()


def test_the_record_of_a_sweep(tmp_path: Path) -> None:
    jobs = [SweepJob(overrides=(f"seed={i}",), swept=(f"seed={i}",), identity=str(i), phases=None,
                     number=i, folder=tmp_path / f"{i}_seed={i}") for i in range(3)]  # fmt: skip
    file = tmp_path / "sweep.json"
    write_record(tmp_path, jobs, command=["train.py", "-m"])
    real = file.read_bytes()

    @fuzz
    @given(st.one_of(damaged(real), mistyped(json.loads(real))))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        found = survives("records of sweeps", lambda: read_record(tmp_path), file)
        if found is not None:
            assert all(job.folder.parent == tmp_path for job in found)
            placed = place(tmp_path, jobs)
            assert len({job.number for job in placed}) == len(jobs)

    check()

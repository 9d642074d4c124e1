"""What is said of a sweep while it runs and at its end, on a terminal and elsewhere."""

import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from rich.console import Console

from rlhf_exp.runs import status
from rlhf_exp.sweeps import monitor
from rlhf_exp.sweeps.monitor import Monitor, duration, problems, show_plan, summary
from tests.sweeps.build_jobs import build_job, placed_jobs, write_rows, write_status

ROWS = [
    {"phase": 1, "objective/scores": 0.25, "objective/kl": 0.5},
    {"phase": 2, "objective/scores": 0.4567, "objective/kl": 0.0123},
]
EVALUATION = {"phase": 2, "eval/score": 0.9, "eval/kl": 0.1}


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(monitor, "time", own)
    return own


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(monitor, "POLL_S", 0.01)


def plain(*, width: int = 80) -> Console:
    """A file or a pipe."""
    return Console(file=io.StringIO(), width=width, _environ={})


def terminal(*, term: str = "xterm") -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=80, height=12, _environ={"TERM": term}
    )


def said(console: Console) -> str:
    """What was printed, without colors."""
    return re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())


def frames(console: Console) -> list[str]:
    """What stood on a terminal, one picture after another."""
    pictures = re.split(r"(?:\r|\x1b\[1A|\x1b\[2K)+", said(console))
    return [re.sub(r"\x1b\[\?25[hl]", "", picture).rstrip("\n") for picture in pictures]


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


def render(table, *, width: int = 80) -> list[str]:
    console = plain(width=width)
    console.print(table)
    return [line.rstrip() for line in said(console).splitlines()]


def test_elsewhere_there_is_a_line_for_each_start_and_each_end(tmp_path):
    jobs = placed_jobs(tmp_path, 3)
    console = plain()
    with Monitor(jobs, console):
        assert said(console) == "", "to wait is not worth a line"
        write_status(jobs[0].folder, "running")
        until(lambda: "started" in said(console))
        write_rows(jobs[0].folder, ROWS)
        write_status(jobs[2].folder, "running")
        until(lambda: "job 2" in said(console))
        write_rows(jobs[0].folder, [*ROWS, EVALUATION])
        write_status(jobs[0].folder, "done")
        until(lambda: "done" in said(console))
        write_status(jobs[2].folder, "failed", "ValueError: bad\nmore of it")
    assert said(console).splitlines() == [
        "job 0 (seed=0) started",
        "job 2 (seed=2) started",
        "job 0 (seed=0) done: score 0.900, KL 0.100  [1 done, 1 running, 1 waiting]",
        "job 2 (seed=2) failed: ValueError: bad  [1 done, 1 failed, 1 waiting]",
    ]


def test_a_running_job_is_shown_with_its_gpu(tmp_path, monkeypatch):
    [job] = placed_jobs(tmp_path, 1)
    monkeypatch.setenv("RLHF_EXP_GPU", "MIG-1")
    console = plain()
    with Monitor([job], console):
        job.folder.mkdir()
        status.write_status(job.folder, "running")
        until(lambda: "started" in said(console))
        assert render(summary([job]))[1].split()[2:] == ["running,", "GPU", "MIG-1"]
        status.write_status(job.folder, "done")
    assert said(console).splitlines()[0] == "job 0 (seed=0) started on GPU MIG-1"
    assert render(summary([job]))[1].split()[2:] == ["done"]
    assert status.read_state(job.folder).gpu == "MIG-1"


def test_what_ended_before_is_not_told_again(tmp_path):
    jobs = placed_jobs(tmp_path, 2)
    write_status(jobs[0].folder, "done")
    console = plain()
    with Monitor(jobs, console):
        write_status(jobs[1].folder, "interrupted")
    assert said(console).splitlines() == [
        "job 1 (seed=1) interrupted  [1 done, 1 interrupted]",
    ]


def test_lines_elsewhere_are_whole_however_long_and_of_any_characters(tmp_path):
    [job] = placed_jobs(tmp_path, 1)
    job = replace(job, swept=("task.prefix=[bold]x[/bold]" + "y" * 100,))
    console = plain(width=40)
    with Monitor([job], console):
        write_status(job.folder, "failed", "[red]é[/red] " + "z" * 100)
    [line] = said(console).splitlines()
    assert "[bold]x[/bold]" in line
    assert "[red]é[/red] " + "z" * 100 in line


def test_a_terminal_shows_a_table_with_counts_that_fits_its_height(tmp_path):
    jobs = placed_jobs(tmp_path, 40)
    for job in jobs[:20]:
        write_status(job.folder, "done")
    write_status(jobs[30].folder, "running")
    write_rows(jobs[30].folder, ROWS)
    console = terminal()
    with Monitor(jobs, console):
        until(lambda: "19 waiting" in said(console))
        write_status(jobs[31].folder, "running")
        until(lambda: "18 waiting" in said(console))
    pictures = [frame for frame in frames(console) if "waiting" in frame]
    assert pictures
    for picture in pictures:
        assert len(picture.splitlines()) <= 12
        assert all(len(line) <= 80 for line in picture.splitlines())
    last = pictures[-1].splitlines()
    assert last[0].strip() == "20 done, 2 running, 18 waiting"
    assert re.match(r" *# +job +status +phase +score +KL +ETA", last[1])
    # Those that run come first, then those that wait; what is done has the least to say.
    rows = [line.split() for line in last[2:-1]]
    assert ["30", "seed=30", "running", "2/10", "0.457", "0.012"] in rows
    assert ["31", "seed=31", "running"] in rows
    assert not any("done" in row for row in rows)
    assert [int(row[0]) for row in rows] == [20, 21, 22, 23, 30, 31]
    assert last[-1].strip() == "34 more"


def test_a_table_of_long_names_fits_too(tmp_path):
    jobs = [replace(job, swept=(f"a.b={'word' * 60}",)) for job in placed_jobs(tmp_path, 9)]
    write_status(jobs[0].folder, "running")
    console = terminal()
    with Monitor(jobs, console):
        until(lambda: "waiting" in said(console))
    pictures = [frame for frame in frames(console) if "waiting" in frame]
    assert all(len(picture.splitlines()) <= 12 for picture in pictures)
    assert all("1 running, 8 waiting" in picture.splitlines()[0] for picture in pictures)


def test_a_terminal_keeps_what_failed_and_nothing_else(tmp_path):
    jobs = placed_jobs(tmp_path, 2)
    console = terminal()
    with Monitor(jobs, console):
        write_status(jobs[0].folder, "done")
        write_status(jobs[1].folder, "failed", "no memory")
        until(lambda: "no memory" in said(console))
    assert "job 1 (seed=1) failed: no memory  [1 done, 1 failed]" in said(console)
    assert "job 0 (seed=0) done" not in said(console)
    assert frames(console)[-1] == "", "the table is removed at the end"


def test_a_terminal_that_cannot_redraw_has_lines(tmp_path):
    [job] = placed_jobs(tmp_path, 1)
    console = terminal(term="dumb")
    with Monitor([job], console):
        write_status(job.folder, "done")
    assert said(console) == "job 0 (seed=0) done  [1 done]\n"


def test_the_time_left_of_a_job_is_by_its_phases_since_it_was_seen(tmp_path, clock):
    [job] = placed_jobs(tmp_path, 1)
    console = terminal()
    with Monitor([job], console):
        write_status(job.folder, "running")
        # It goes on from a checkpoint, so that what is done says nothing about its pace.
        write_rows(job.folder, [{"phase": 4, "objective/scores": 0.1}])
        until(lambda: "4/10" in said(console))
        assert "min" not in said(console)
        clock.now += 60
        write_rows(job.folder, [{"phase": 6, "objective/scores": 0.1}])
        until(lambda: "6/10" in said(console))
    [row] = {line.strip() for line in said(console).splitlines() if "6/10" in line}
    assert row.split("0.100")[1].split() == ["2", "min", "0", "s"], "30 s a phase, 4 to go"


def test_the_time_left_of_a_sweep_is_by_the_jobs_that_have_ended(tmp_path, clock):
    jobs = placed_jobs(tmp_path, 4)
    console = terminal()
    with Monitor(jobs, console):
        write_status(jobs[0].folder, "running")
        until(lambda: "1 running" in said(console))
        clock.now += 100
        write_status(jobs[1].folder, "running")
        until(lambda: "2 running" in said(console))
        assert "left" not in said(console)
        write_status(jobs[0].folder, "done")
        until(lambda: "1 done" in said(console))
        # One job of 100 s runs since now and two wait.
        until(lambda: "about 5 min 0 s left" in said(console))
        clock.now += 40
        until(lambda: "about 4 min 20 s left" in said(console))


def test_the_table_at_the_end_has_every_job_with_its_score(tmp_path):
    jobs = placed_jobs(tmp_path, 30)
    write_status(jobs[0].folder, "done")
    write_rows(jobs[0].folder, [*ROWS, EVALUATION])
    write_status(jobs[1].folder, "interrupted")
    write_rows(jobs[1].folder, ROWS)
    jobs[1] = replace(jobs[1], phases=None)
    lines = render(summary(jobs))
    assert len(lines) == 31
    assert lines[0].split() == ["#", "job", "status", "phase", "score", "KL"]
    assert lines[1].split() == ["0", "seed=0", "done", "2/10", "0.900", "0.100"]
    assert lines[2].split() == ["1", "seed=1", "interrupted", "2", "0.457", "0.012"]
    assert lines[3].split() == ["2", "seed=2", "waiting"]


def test_problems_name_the_job_the_reason_and_the_log(tmp_path):
    jobs = placed_jobs(tmp_path, 5)
    write_status(jobs[0].folder, "done")
    write_status(jobs[1].folder, "failed", "killed by SIGKILL\nat phase 3")
    write_status(jobs[2].folder, "interrupted", "KeyboardInterrupt")
    write_status(jobs[3].folder, "failed")
    for job in jobs[:4]:
        (job.folder / "train.log").touch()
    assert problems(jobs) == [
        f"job 1 (seed=1) failed: killed by SIGKILL; see {tmp_path}/1/train.log",
        f"job 2 (seed=2) interrupted; see {tmp_path}/2/train.log",
        f"job 3 (seed=3) failed: no reason was given; see {tmp_path}/3/train.log",
        "job 4 (seed=4) did not start",
    ]
    assert problems(jobs[:1]) == []


def plan(jobs: Sequence, *, at_once: int) -> list[str]:
    console = plain(width=120)
    show_plan(jobs, console, at_once=at_once)
    return [line.rstrip() for line in said(console).splitlines()]


def test_a_plan_has_every_job_with_its_folder_and_time(tmp_path):
    jobs = [replace(job, seconds=90.0) for job in placed_jobs(tmp_path, 5)]
    jobs[4] = replace(jobs[4], seconds=None)
    write_status(jobs[0].folder, "done")
    write_status(jobs[1].folder, "failed")
    header, *rows, total = plan(jobs, at_once=2)
    assert header.split() == ["#", "job", "folder", "now", "time"]
    assert [row.split() for row in rows] == [
        ["0", "seed=0", "0", "done"],
        ["1", "seed=1", "1", "failed", "1", "min", "30", "s"],
        ["2", "seed=2", "2", "to", "run", "1", "min", "30", "s"],
        ["3", "seed=3", "3", "to", "run", "1", "min", "30", "s"],
        ["4", "seed=4", "4", "to", "run"],
    ]
    assert total.startswith(
        f"4 of 5 jobs to run, in {tmp_path}; time: about 3 min 0 s, 2 at a time"
    )
    assert total.endswith("nothing was started")
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(("at_once", "words"), [(1, "6 min 0 s"), (3, "3 min 0 s"), (16, "1 min")])
def test_a_plan_counts_no_more_places_than_jobs(tmp_path, at_once, words):
    jobs = [replace(job, seconds=90.0) for job in placed_jobs(tmp_path, 4)]
    if at_once == 3:
        jobs = jobs[:2] + [replace(job, seconds=270.0) for job in jobs[2:]]
        words = "4 min 0 s"
    assert f"time: about {words}" in plan(jobs, at_once=at_once)[-1]


def test_a_plan_without_runs_to_judge_by_says_so(tmp_path):
    jobs = placed_jobs(tmp_path, 2)
    assert "time: unknown: no finished run of this shape" in plan(jobs, at_once=1)[-1]
    write_status(jobs[0].folder, "done")
    write_status(jobs[1].folder, "done")
    assert plan(jobs, at_once=1)[-1].startswith("0 of 2 jobs to run")
    assert plan([], at_once=1)[-1].startswith("0 of 0 jobs to run")


def test_names_of_jobs_are_text_not_markup(tmp_path):
    job = build_job("task.prefix=[red]x", number=0, folder=tmp_path / "0")
    for lines in (render(summary([job])), plan([job], at_once=1)):
        assert any("[red]x" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (9.9, "9.9 s"),
        (9.96, "10 s"),
        (41.6, "42 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (100_000, "27 h 46 min"),
    ],
)
def test_a_duration_is_in_words(seconds, words):
    assert duration(float(seconds)) == words

"""Every job of a sweep that has ended says how, even one that could not."""

import json
import threading
import time

import pytest

from rlhf_exp.runs.lock import is_locked
from rlhf_exp.runs.status import read_state
from rlhf_exp.sweeps import dead_jobs as settling
from rlhf_exp.sweeps.dead_jobs import await_and_mark, mark_failed, report_exit
from tests.runs.test_lock import holder
from tests.sweeps.build_jobs import placed_jobs, write_status


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(settling, "POLL_S", 0.02)


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_those_that_died_without_a_word_get_the_status_and_no_others(tmp_path, status):
    jobs = placed_jobs(tmp_path, 5)
    said = {0: "done", 1: "failed", 2: "interrupted", 3: "running"}
    for number, own in said.items():
        write_status(jobs[number].folder, own, f"error of {number}")
    await_and_mark(jobs, status)
    states = [read_state(job.folder) for job in jobs]
    assert [s.status for s in states] == ["done", "failed", "interrupted", status, "waiting"]
    assert [s.error for s in states] == [
        "error of 0", "error of 1", "error of 2", "its process was killed", None
    ]  # fmt: skip
    assert not jobs[4].folder.exists(), "what did not start leaves nothing"


def test_a_job_with_a_living_process_is_waited_for(tmp_path):
    [job, *_] = jobs = placed_jobs(tmp_path, 2)
    write_status(job.folder, "running")
    write_status(jobs[1].folder, "running")
    with holder(job.folder) as process:
        thread = threading.Thread(target=await_and_mark, args=(jobs, "failed"))
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
        assert [read_state(job.folder).status for job in jobs] == ["running", "running"]
        write_status(job.folder, "done")  # the last thing that it does
        process.kill()
        thread.join(10)
        assert not thread.is_alive()
    assert [read_state(job.folder).status for job in jobs] == ["done", "failed"]


def test_a_process_that_was_killed_holds_nobody_up(tmp_path):
    [job] = placed_jobs(tmp_path, 1)
    write_status(job.folder, "running")
    with holder(job.folder) as process:
        process.kill()
        process.wait()
        await_and_mark([job], "failed")
    assert read_state(job.folder).status == "failed"
    assert not is_locked(job.folder)


@pytest.mark.parametrize("before", [None, "running"])
def test_an_error_of_the_launcher_is_that_of_a_job_that_has_said_nothing(tmp_path, before):
    [job] = placed_jobs(tmp_path, 1)
    if before:
        write_status(job.folder, before)
    mark_failed(job, TimeoutError("the queue is full"))
    content = json.loads((job.folder / "status.json").read_text(encoding="utf-8"))
    assert content == {"status": "failed", "error": "TimeoutError: the queue is full"}


@pytest.mark.parametrize("before", ["done", "failed", "interrupted"])
def test_a_job_that_has_said_how_it_ended_keeps_that(tmp_path, before):
    [job] = placed_jobs(tmp_path, 1)
    write_status(job.folder, before, "its own")
    mark_failed(job, SystemExit(2))
    state = read_state(job.folder)
    assert (state.status, state.error) == (before, "its own")


@pytest.mark.parametrize("fail_fast", ["", "1"])
def test_a_failure_stops_a_sweep_that_fails_fast(tmp_path, monkeypatch, fail_fast):
    monkeypatch.setenv("RLHF_EXP_FAIL_FAST", fail_fast)
    done, stopped, killed = placed_jobs(tmp_path, 3)
    write_status(done.folder, "done")
    write_status(stopped.folder, "interrupted")
    write_status(killed.folder, "running")
    report_exit(done.folder, 0)
    report_exit(stopped.folder, 130)
    assert not (tmp_path / ".stop").exists()
    report_exit(killed.folder, -9)
    assert read_state(killed.folder).error == "killed by SIGKILL; was there enough memory?"
    assert (tmp_path / ".stop").exists() == bool(fail_fast)

"""Calls to W&B, to a stand-in for its run: in order, never waiting, dropped when one fails."""

import threading
import time
from pathlib import Path

import pytest

from rlhf_exp.tracking import wandb_thread
from rlhf_exp.tracking.wandb_thread import WandbRun


class Run:
    """What W&B's run is to WandbRun. It answers when it is let."""

    dir = "wandb/run-1/files"

    def __init__(self) -> None:
        self.said: list[object] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    def log(self, row: object) -> None:
        self.may_answer.wait()
        if row == "bad":
            raise RuntimeError("a bad row\nwith a second line")
        self.said.append(row)

    def finish(self, exit_code: int) -> None:
        self.log(("finish", exit_code))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("exit_code", [0, 1])
def test_calls_are_made_in_order_and_before_the_end(exit_code: int, caplog) -> None:
    run = Run()
    told = WandbRun(run, finish_s=10.0)
    for i in range(200):
        told.call(lambda run, i=i: run.log(i))
    told.close(exit_code=exit_code)
    assert run.said == [*range(200), ("finish", exit_code)]
    assert warnings(caplog) == []


def test_a_call_that_fails_is_the_last_but_for_the_end(caplog) -> None:
    run = Run()
    told = WandbRun(run, finish_s=10.0)
    for row in ("a", "bad", "b", "bad"):
        told.call(lambda run, row=row: run.log(row))
    told.close(exit_code=0)
    assert run.said == ["a", ("finish", 0)]
    assert warnings(caplog) == [
        "W&B failed (a bad row); going on without it, the run's folder has all"
    ]


def test_a_run_that_does_not_answer_is_left_behind(caplog, monkeypatch) -> None:
    monkeypatch.setattr(wandb_thread, "SERVICE_S", 0.1)
    monkeypatch.setattr(wandb_thread, "MAX_WAITING", 3)
    run = Run()
    run.may_answer.clear()
    told = WandbRun(run, finish_s=0.2)
    start = time.monotonic()
    told.call(lambda run: run.log("a"))
    told.close(exit_code=0)
    assert 0.2 <= time.monotonic() - start < 2
    where = Path("wandb/run-1")
    assert warnings(caplog) == [
        f"W&B failed (not finished after 0.2 s; later: wandb sync {where}); going on without it,"
        " the run's folder has all"
    ]
    caplog.clear()

    # While it is trained too, where no more is kept for it than so many calls.
    told, start = WandbRun(run, finish_s=0.2), time.monotonic()
    for _ in range(1000):
        told.call(lambda run: run.log("a"))
    assert time.monotonic() - start < 0.2
    [warning] = warnings(caplog)
    assert warning.startswith("W&B failed (it has stopped answering)")
    told.close(exit_code=0)
    assert warnings(caplog) == [warning]
    run.may_answer.set()

"""A run stops between two steps when it is asked to, and at once when it is asked twice."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rlhf_exp.runs.stopping import SIGNALS, Interrupted, StopRequests

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 138}


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_a_signal_within_steps_waits_for_the_end_of_one(name, code, capfd):
    stop = StopRequests()
    with stop.listening(), stop.steps():
        assert stop.asked() is None
        send(name)
        asked = stop.asked()
    assert isinstance(asked, Interrupted)
    assert (str(asked), asked.exit_code) == (name, code)
    assert asked.to_be_requeued == (name == "SIGUSR1")
    assert (
        f"{name}: finishing this step and saving; once more ends at once" in capfd.readouterr()[1]
    )
    with pytest.raises(Interrupted), stop.steps():  # the next loop does not begin
        raise AssertionError


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_a_signal_outside_of_steps_stops_at_once(name, code):
    def work():
        with StopRequests().listening():
            send(name)
            time.sleep(9)

    with pytest.raises(Interrupted) as caught:
        work()
    assert caught.value.exit_code == code
    assert not isinstance(caught.value, Exception)


def test_handlers_are_put_back_and_what_is_ignored_stays_ignored():
    before = [signal.getsignal(number) for number in SIGNALS]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequests()
        with stop.listening():
            send("SIGHUP")
            assert signal.getsignal(signal.SIGTERM) == stop._receive
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_on_another_thread_nothing_is_listened_to():
    seen = []

    def work():
        with StopRequests().listening() as stop, stop.steps():
            seen.append(stop.asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


SCRIPT = """
import os, signal, sys, time
from rlhf_exp.runs.stopping import StopRequests
stop = StopRequests(abandon=lambda why: print("abandoned:", why, flush=True))
with stop.listening(), stop.steps():
    for name in sys.argv[1:]:
        os.kill(os.getpid(), getattr(signal, name))
    print("goes on", stop.asked(), flush=True)
"""


@pytest.mark.parametrize(
    ("names", "code", "out"),
    [
        (["SIGINT", "SIGINT"], 130, "abandoned: SIGINT, the second\n"),
        (["SIGTERM", "SIGINT"], 130, "abandoned: SIGINT, the second\n"),
        (["SIGINT", "SIGTERM"], 143, "abandoned: SIGTERM, the second\n"),
        (["SIGINT", "SIGHUP"], 0, "goes on SIGINT\n"),  # whoever interrupted it has gone
    ],
)
def test_a_second_signal_ends_the_process_where_it_is(names, code, out):
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, out)
    assert "Traceback" not in done.stderr


FORKING = """
import multiprocessing, os, signal, sys, time
from rlhf_exp.runs.stopping import StopRequests
stop = StopRequests(abandon=lambda why: print("abandoned:", why, flush=True))
context = multiprocessing.get_context("fork")
ours, theirs = context.Pipe()

def work():
    while True:
        theirs.send(None)
        time.sleep(0.01)

with stop.listening(), stop.steps():
    child = context.Process(target=work)
    child.start()
    theirs.close()
    for name in sys.argv[1:]:
        ours.recv()
        os.kill(child.pid, getattr(signal, name))
        try:
            for _ in range(50):
                ours.recv()
        except EOFError:
            child.join()
    print(child.exitcode, stop.asked(), flush=True)
    child.kill()
"""


@pytest.mark.parametrize(
    ("names", "out"),
    [
        (["SIGTERM"], "-15 None\n"),
        (["SIGINT", "SIGTERM"], "-15 None\n"),
        (["SIGINT", "SIGINT"], "130 None\n"),
        (["SIGINT"], "None None\n"),  # of a terminal, which interrupts the run as well
        (["SIGUSR1"], "None None\n"),  # of a queue
    ],
)
def test_a_process_that_the_run_forks_does_not_answer_for_it(names, out):
    done = subprocess.run([sys.executable, "-c", FORKING, *names], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (out, "")


KILLED_WHILE_FORKED = """
import os, signal, time
from rlhf_exp.runs.stopping import StopRequests
with StopRequests().listening():
    children = []
    for _ in range(50):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        children.append(child)
    deadline, ended = time.monotonic() + 10, 0
    while ended < 50 and time.monotonic() < deadline:
        ended += os.waitpid(-1, os.WNOHANG)[0] != 0
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    print(ended, signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def test_a_process_that_is_ended_while_it_is_forked_ends():
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_FORKED], capture_output=True)
    assert (done.stdout, done.stderr) == (b"50 False\n", b"")


def test_the_time_is_up_before_a_step_that_would_not_fit(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stop = StopRequests()
    stop.limit(1.0, began=90.0)  # so that it ends at 150
    seen = []
    with stop.steps():
        for takes in (10.0, 20.0, 1.0, 3.0):
            clock[0] += takes
            seen.append(stop.asked())
    # At 110, 130, 131 and 134, steps of at most 10, 20, 20 and 20 seconds.
    assert [asked is not None for asked in seen] == [False, False, True, True]
    assert seen[2].exit_code == 75
    assert str(seen[2]) == "max_minutes=1 would end before another step does"
    assert not seen[2].to_be_requeued


def test_without_a_limit_no_time_is_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stop = StopRequests()
    with stop.steps():
        clock[0] += 1e9
        assert stop.asked() is None

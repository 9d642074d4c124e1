"""Whatever happens to a function's process, its caller gets an exit code."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rlhf_exp.sweeps.isolation import PRELOADED, call_in_process, describe_end

ROOT = Path(__file__).parents[2]
# A caller of its own; it preloads nothing, so that it begins at once.
CALLER = """
import signal, sys
from pathlib import Path
from rlhf_exp.sweeps import isolation
from tests.sweeps import test_isolation as functions

if __name__ == "__main__":
    isolation.PRELOADED = ()
    log, result = Path(sys.argv[1]), Path(sys.argv[2])
    {body}
"""


def end_well(*words: str) -> None:
    print(*words)
    print("to stderr", file=sys.stderr)
    os.system("echo of a child")


def exit_with(code: int | str | None) -> None:
    sys.exit(code)


def kill_itself(number: int) -> None:
    os.kill(os.getpid(), number)


def fail() -> None:
    print("before")
    raise RuntimeError("of the function")


def write_facts(path: Path) -> None:
    """Which process this is and what its environment says."""
    facts = (os.getpid(), os.getppid(), os.environ.get("RLHF_EXP_TEST"), os.getcwd())
    path.write_text("\n".join(map(str, facts)), encoding="utf-8")


def wait_long(path: Path, interrupts: int) -> None:
    """Says its number and waits; outlives all interrupts but the last."""
    partial = path.with_suffix(".partial")
    partial.write_text(str(os.getpid()), encoding="utf-8")
    partial.rename(path)
    while interrupts:
        try:
            time.sleep(60)
            return
        except KeyboardInterrupt:
            interrupts -= 1
            print("interrupted", flush=True)
    sys.exit(130)


def begin(tmp_path: Path, body: str) -> subprocess.Popen:
    """A caller in a session of its own, as a terminal's."""
    script = tmp_path / "caller.py"
    script.write_text(CALLER.format(body=body), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "log"), str(tmp_path / "result")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def until(holds: Callable[[], bool], *, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("function", "arguments", "code"),
    [
        (end_well, (), 0),
        (exit_with, (None,), 0),
        (exit_with, (3,), 3),
        (exit_with, ("a message",), 1),
        (kill_itself, (signal.SIGKILL,), -9),
        (kill_itself, (signal.SIGTERM,), -15),
        (fail, (), 1),
    ],
)
def test_the_exit_code_says_how_it_ended(tmp_path, function, arguments, code):
    assert call_in_process(function, *arguments, log=tmp_path / "log") == code


def test_all_output_goes_to_the_end_of_the_log(tmp_path, capfd):
    log = tmp_path / "new" / "folder" / "train.log"
    assert call_in_process(end_well, "é", "two", log=log) == 0
    assert call_in_process(fail, log=log) == 1
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines[:4] == ["é two", "to stderr", "of a child", "before"]
    assert "Traceback (most recent call last):" in lines
    assert lines[-1] == "RuntimeError: of the function"
    assert capfd.readouterr() == ("", "")


def test_what_was_said_before_a_kill_is_in_the_log(tmp_path):
    assert call_in_process(say_and_die, log=tmp_path / "log") == -9
    assert (tmp_path / "log").read_text(encoding="utf-8") == "said\n"


def say_and_die() -> None:
    print("said")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("value", ["first", "second", None])
def test_the_environment_is_that_of_the_caller_at_the_time_of_the_call(
    tmp_path, monkeypatch, value
):
    if value is None:
        monkeypatch.delenv("RLHF_EXP_TEST", raising=False)
    else:
        monkeypatch.setenv("RLHF_EXP_TEST", value)
    monkeypatch.chdir(tmp_path)
    assert call_in_process(write_facts, Path("facts"), log=Path("log")) == 0
    pid, _, environment, folder = (tmp_path / "facts").read_text(encoding="utf-8").splitlines()
    assert environment == str(value)
    assert folder == str(tmp_path)
    assert int(pid) != os.getpid()
    assert (tmp_path / "log").is_file(), "a relative log is in the caller's folder"


def test_a_process_begins_with_what_nearly_every_run_imports(tmp_path):
    assert call_in_process(say_what_is_imported, log=tmp_path / "log") == 0
    # The server passes over what it cannot import.
    missing = (tmp_path / "log").read_text(encoding="utf-8").splitlines()[-1]
    assert missing == "[]"


def say_what_is_imported() -> None:
    print([name for name in PRELOADED if name not in sys.modules])


def test_nothing_is_left_when_the_caller_is_killed(tmp_path):
    started = tmp_path / "result"
    body = "isolation.call_in_process(functions.wait_long, result, 9, log=log)"
    with begin(tmp_path, body) as caller:
        until(started.is_file)
        pid = int(started.read_text(encoding="utf-8"))
        assert is_alive(pid)
        assert pid != caller.pid
        caller.kill()
        until(lambda: not is_alive(pid))


@pytest.mark.parametrize("of_the_group", [True, False], ids=["a terminal", "one process"])
def test_an_interrupt_of_the_caller_ends_it_too(tmp_path, of_the_group):
    started = tmp_path / "result"
    body = "isolation.call_in_process(functions.wait_long, result, 1, log=log)"
    with begin(tmp_path, body) as caller:
        until(started.is_file)
        pid = int(started.read_text(encoding="utf-8"))
        if of_the_group:
            os.killpg(caller.pid, signal.SIGINT)
        else:
            os.kill(caller.pid, signal.SIGINT)
        out, _ = caller.communicate(timeout=30)
        assert out.splitlines()[-1] == "KeyboardInterrupt"
        assert caller.returncode == -signal.SIGINT
        assert not is_alive(pid), "the caller returns after it has ended"
    # It could end by itself: one interrupt reaches it, not two.
    assert (tmp_path / "log").read_text(encoding="utf-8") == "interrupted\n"


def test_a_file_asks_the_process_to_stop(tmp_path):
    (tmp_path / "stop").touch()
    code = call_in_process(
        wait_long, tmp_path / "pid", 1, log=tmp_path / "log", stop_file=tmp_path / "stop"
    )
    assert code in (-signal.SIGHUP, -signal.SIGTERM)  # the second under nohup
    assert "fail_fast=true stops the sweep" in (tmp_path / "log").read_text()


def test_what_does_not_end_by_an_interrupt_is_killed(tmp_path):
    started = tmp_path / "result"
    body = (
        "isolation.GRACE_S = 0.2; "
        "isolation.call_in_process(functions.wait_long, result, 9, log=log)"
    )
    with begin(tmp_path, body) as caller:
        until(started.is_file)
        pid = int(started.read_text(encoding="utf-8"))
        os.kill(caller.pid, signal.SIGINT)
        caller.communicate(timeout=30)
        assert not is_alive(pid)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "interrupted\n"


def test_it_works_where_the_path_of_temporary_files_is_too_long_for_a_socket(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    body = (
        "print(isolation.call_in_process(functions.exit_with, 3, log=log),"
        " isolation.call_in_process(functions.end_well, 'well', log=log))"
    )
    with begin(tmp_path, body) as caller:
        out, _ = caller.communicate(timeout=60)
    assert out == "3 0\n"
    assert (tmp_path / "log").read_text(encoding="utf-8").splitlines()[0] == "well"


def test_it_works_in_a_worker_of_joblib(tmp_path):
    pytest.importorskip("joblib")
    body = (
        "from joblib import Parallel, delayed; "
        "calls = [(functions.exit_with, (3,)), (functions.kill_itself, (9,)), "
        "(functions.end_well, ('x',)), (functions.end_well, ('y',))]; "
        "print(Parallel(n_jobs=2)(delayed(functions.call)(f, a, log.with_name(str(i)))"
        " for i, (f, a) in enumerate(calls)))"
    )
    with begin(tmp_path, body) as caller:
        out, _ = caller.communicate(timeout=60)
    assert out.splitlines()[-1] == "[3, -9, 0, 0]", out
    assert (tmp_path / "3").read_text(encoding="utf-8").splitlines()[0] == "y"


def call(function: Callable[..., None], arguments: tuple, log: Path) -> int:
    """In a worker, which preloads nothing either."""
    from rlhf_exp.sweeps import isolation

    isolation.PRELOADED = ()
    return call_in_process(function, *arguments, log=log)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended with exit code 0"),
        (3, "ended with exit code 3"),
        (-9, "killed by SIGKILL; was there enough memory?"),
        (-15, "killed by SIGTERM"),
        (-63, "killed by signal 63"),
    ],
)
def test_an_end_is_described_by_its_code(code, words):
    assert describe_end(code) == words

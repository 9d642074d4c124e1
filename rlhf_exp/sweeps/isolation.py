"""Runs a function in a process of its own, so that nothing that happens to it, a kill for memory
included, reaches the caller.

The process is forked from a server that has imported the libraries once and done nothing else, so
that it begins within a fraction of a second.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from rlhf_exp.machine.streams import make_streams_unbreakable

# What nearly every run imports and what takes longest.
PRELOADED = (
    "rlhf_exp.machine.environment", "rlhf_exp.app.experiment", "rlhf_exp.stages.ppo",
    "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2", "matplotlib.backends.backend_agg",
)  # fmt: skip
SWEEP_PID = "RLHF_EXP_SWEEP_PID"  # environment: the process whose end ends those of its jobs
LONGEST_TEMP_DIR = 70  # of the 104 characters that macOS allows; multiprocessing adds 32
POLL_S = 1.0
GRACE_S = 600.0  # for one that was asked to stop, which finishes a step and saves


def call_in_process(function: Callable[..., None], *arguments: Any, log: Path) -> int:
    """Calls the function in another process, its output appended to the log, and returns the exit
    code, which is minus the number of the signal that killed it. Function and arguments are
    pickled. An interrupt of the caller asks it to stop too, a second one ends it."""
    process = _context().Process(
        target=_run, args=(function, arguments, log.resolve(), dict(os.environ))
    )
    process.start()
    try:
        process.join()
    except BaseException:
        _stop(process)
        raise
    finally:
        if not _is_sweep_alive():
            os._exit(1)  # a worker of a pool would wait for ever to tell its owner
    assert process.exitcode is not None
    return process.exitcode


def describe_end(exit_code: int) -> str:
    """How a process ended that has not said so itself."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"killed by {name}" + ("; was there enough memory?" if name == "SIGKILL" else "")


def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    if multiprocessing.get_start_method(allow_none=True) not in (None, *methods):
        # A worker of joblib tells its children of a method that only joblib knows.
        multiprocessing.set_start_method("spawn", force=True)
    # The server listens on a socket below the folder of temporary files. Where its path is too
    # long, each process imports the libraries itself.
    if "forkserver" not in methods or len(tempfile.gettempdir()) > LONGEST_TEMP_DIR:
        return multiprocessing.get_context("spawn")
    context: BaseContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _stop(process: Any) -> None:
    """Asks the process to stop and waits; if this is interrupted again, it has to end at once."""
    os.kill(process.pid, signal.SIGINT)
    try:
        process.join(GRACE_S)
    except BaseException:
        os.kill(process.pid, signal.SIGINT)
        process.join(POLL_S)
    if process.exitcode is None:
        process.kill()
        process.join()


def _run(
    function: Callable[..., None],
    arguments: Sequence[Any],
    log: Path,
    environment: Mapping[str, str],
) -> None:
    # A group of its own: a Ctrl-C in the terminal is its caller's to pass on, once.
    os.setpgid(0, 0)
    # One that a script started in its background ignores it, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The server keeps the environment that it began with.
    os.environ.clear()
    os.environ.update(environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    make_streams_unbreakable()
    threading.Thread(target=_end_with_caller, daemon=True).start()
    function(*arguments)


def _is_sweep_alive() -> bool:
    import psutil

    return psutil.pid_exists(int(os.environ.get(SWEEP_PID) or os.getpid()))


def _end_with_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    # The caller may be a worker of a pool that does not notice its own caller's end.
    while _is_sweep_alive() and not wait([caller.sentinel], timeout=POLL_S):
        pass
    hung_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN  # under nohup it is not heard
    os.kill(os.getpid(), signal.SIGHUP if hung_up else signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)

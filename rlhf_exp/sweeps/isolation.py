"""Runs a function in a separate process, so that the caller survives its crash, even a kill for
memory.

The process is forked from a server that has only imported the libraries, so it starts within a
fraction of a second.
"""

import logging
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

log = logging.getLogger(__name__)

# Modules that nearly every run imports, and the slowest imports.
PRELOADED = (
    "rlhf_exp.machine.environment", "rlhf_exp.app.main", "rlhf_exp.app.experiment",
    "rlhf_exp.stages.ppo", "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2", "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)  # fmt: skip
SWEEP_PID = "RLHF_EXP_SWEEP_PID"  # environment variable: jobs end when this process ends
LONGEST_TEMP_DIR = 70  # characters; macOS allows 104, and multiprocessing adds 32
POLL_S = 1.0
GRACE_S = 600.0  # to finish a step and save after a request to stop


def call_in_process(
    function: Callable[..., None], *arguments: Any, log: Path, stop_file: Path | None = None
) -> int:
    """The exit code of calling the function in another process: minus the signal's number if a
    signal killed it. Its output is appended to the log; function and arguments are pickled. The
    first interrupt of the caller asks the process to stop, the second ends it; `stop_file` asks it
    to stop as soon as it exists."""
    stop_file = stop_file and stop_file.absolute()
    process = _context().Process(
        target=_run, args=(function, arguments, log.resolve(), dict(os.environ), stop_file)
    )
    process.start()
    try:
        process.join()
    except BaseException:
        _stop(process)
        raise
    finally:
        if not _is_sweep_alive():
            os._exit(1)  # a worker of a pool would wait forever for its owner
    assert process.exitcode is not None
    return process.exitcode


def describe_end(exit_code: int) -> str:
    """A description of an exit code, for a process that reported nothing itself."""
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
        # Workers of joblib set a start method that only joblib knows.
        multiprocessing.set_start_method("spawn", force=True)
    # The server listens on a socket below the folder of temporary files. If that path is too long,
    # each process imports the libraries itself.
    if "forkserver" not in methods or len(tempfile.gettempdir()) > LONGEST_TEMP_DIR:
        return multiprocessing.get_context("spawn")
    context: BaseContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _stop(process: Any) -> None:
    """Asks the process to stop and waits; a second interrupt ends it at once."""
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
    log_file: Path,
    environment: Mapping[str, str],
    stop_file: Path | None,
) -> None:
    # A separate group: the terminal's Ctrl-C reaches only the caller, which passes it on once.
    os.setpgid(0, 0)
    # A process in a script's background ignores SIGINT, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The server still has the environment that it started with.
    os.environ.clear()
    os.environ.update(environment)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    make_streams_unbreakable()
    threading.Thread(target=_end_with_caller, args=(stop_file,), daemon=True).start()
    function(*arguments)


def _is_sweep_alive() -> bool:
    import psutil

    return psutil.pid_exists(int(os.environ.get(SWEEP_PID) or os.getpid()))


def _end_with_caller(stop_file: Path | None) -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    # The caller may be a worker of a pool that does not notice its own caller's end.
    while _is_sweep_alive() and not wait([caller.sentinel], timeout=POLL_S):
        if stop_file is not None and stop_file.exists():
            log.warning("another job has failed, and fail_fast=true stops the sweep")
            break
    hung_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN  # nohup ignores it
    os.kill(os.getpid(), signal.SIGHUP if hung_up else signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)

"""A W&B run that never delays training: its calls run on a thread of their own. If W&B fails or
stops answering, it is dropped with one warning.

It knows how W&B's service fails, and nothing of what is logged.
"""

import logging
import queue
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

log = logging.getLogger(__name__)

MAX_WAITING = 10_000  # calls
SERVICE_S = 5.0  # seconds that the service may take to end; a dead one never answers

Call = Callable[[Any], object]


class WandbRun:
    """Passes calls to a W&B run in their order. Only `close` waits."""

    def __init__(self, run: Any, *, finish_s: float) -> None:
        self._run, self._finish_s = run, finish_s
        self._calls: queue.Queue[Call] = queue.Queue(MAX_WAITING)
        self._is_finished, self._failed = False, threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="W&B", daemon=True)
        self._thread.start()

    def call(self, call: Call) -> None:
        """Queues a call with the run. Does nothing once a call has failed."""
        if self._failed.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up("it has stopped answering")

    def close(self, *, exit_code: int) -> None:
        """Ends the run after all queued calls; waits at most `finish_s` seconds for that."""

        def finish(run: Any) -> None:
            # Not `with run`, which prints a traceback if the block raises.
            run.finish(exit_code=exit_code)
            self._is_finished = True

        self.call(finish)
        self._thread.join(self._finish_s)
        if self._thread.is_alive():
            files = shlex.quote(str(Path(self._run.dir).parent))
            self._give_up(f"not finished after {self._finish_s:g} s; later: wandb sync {files}")
        if self._failed.is_set():
            drop_service(lambda: self._run.finish(exit_code=exit_code))

    def _work(self) -> None:
        while not (self._is_finished or self._failed.is_set()):
            call = self._calls.get()
            try:
                call(self._run)
            except Exception as error:
                self._give_up(str(error).partition("\n")[0] or type(error).__name__)

    def _give_up(self, why: str) -> None:
        with self._lock:
            if not self._failed.is_set():
                self._failed.set()
                log.warning("W&B failed (%s); going on without it, the run's folder has all", why)


def drop_service(*last: Callable[[], object]) -> None:
    """Stops W&B's service of this process, after the `last` calls if it still answers. The next run
    starts a new service, and the interpreter does not wait for this one when it ends."""

    def tear_down() -> None:
        import wandb

        for end in (*last, wandb.teardown):
            try:
                end()
            except Exception as error:  # every call fails if the service is dead
                log.debug("W&B's service: %s", error)

    thread = threading.Thread(target=tear_down, name="W&B teardown", daemon=True)
    thread.start()
    thread.join(SERVICE_S)
    if thread.is_alive():
        # Otherwise it tries to upload long after this process has ended.
        for process in psutil.Process().children():
            if process.name().startswith("wandb-"):
                process.kill()

"""Requests to stop a run early: signals and a time limit.

It knows when a run may stop, not what it does then.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Signals that ask a process to end.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TIME_IS_UP = 75  # EX_TEMPFAIL of sysexits.h: come again


class Interrupted(BaseException):
    """A run that was asked to stop and can be resumed; the message gives the reason. `exit_code` is
    128 plus the signal's number, or 75 if the time is up. Like KeyboardInterrupt it is not an
    Exception, so that the handlers of a failing reward or W&B do not swallow it."""

    def __init__(self, why: str, exit_code: int) -> None:
        super().__init__(why)
        self.exit_code = exit_code

    @property
    def to_be_requeued(self) -> bool:
        """True if the signal was SIGUSR1: a queue announces with it that the job's time ends."""
        return self.exit_code == 128 + signal.SIGUSR1


class StopRequests:
    """Requests to stop a run. Within `steps` the first signal takes effect at the end of the step;
    elsewhere, for instance while a model is loaded, it raises Interrupted at once. A second signal
    calls `abandon(why)` and ends the process; a second SIGHUP is ignored, since a caller that hung
    up may have sent an interrupt before.

    In a process that is forked within `listening`, for instance by a reward, SIGTERM has its normal
    effect. The first of the other signals, which terminals and queues send to all processes of a
    job, is ignored there, so that the run can finish its step.
    """

    def __init__(self, *, abandon: Callable[[str], None] = lambda why: None) -> None:
        self._abandon = abandon
        self._limit_s, self._began = math.inf, 0.0
        self._request: Interrupted | None = None
        self._in_steps = False
        self._last = self._longest = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def limit(self, minutes: float, *, began: float) -> None:
        """Limits the run to `minutes` from `began` of time.monotonic(): it stops before a step as
        long as the longest so far would exceed them. It always makes at least one step."""
        self._limit_s, self._began = 60 * minutes, began

    @contextmanager
    def listening(self) -> Iterator["StopRequests"]:
        """Handles signals within the block. Does nothing outside the main thread, the only one on
        which Python handles signals."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # as under nohup
        self._process = os.getpid()
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        _listening.append(self)
        try:
            yield self
        finally:
            _listening.remove(self)
            for number, handler in self._before.items():
                signal.signal(number, handler)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """A loop that stops only between steps. Raises Interrupted if a stop was requested."""
        if self._request is not None:
            raise self._request
        self._in_steps, self._last, self._longest = True, time.monotonic(), 0.0
        try:
            yield
        finally:
            self._in_steps = False

    def asked(self) -> Interrupted | None:
        """The reason to stop now, or None to continue. Call it at the end of each step."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        left = self._began + self._limit_s - now
        if self._request is None and left < self._longest:
            why = f"max_minutes={self._limit_s / 60:g} would end before another step does"
            self._request = Interrupted(why, TIME_IS_UP)
        return self._request

    def release_sigterm(self) -> None:
        """Restores the handler that SIGTERM had before `listening`."""
        if signal.SIGTERM in self._before:
            signal.signal(signal.SIGTERM, self._before[signal.SIGTERM])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name, code = signal.Signals(number).name, 128 + number
        is_run = os.getpid() == self._process
        if self._request is not None:
            if name == "SIGHUP":
                return
            if is_run:
                self._abandon(f"{name}, the second")
                _say(f"\n{name} once more: ending at once\n")
            os._exit(code)
        self._request = Interrupted(name, code)
        if not is_run:
            return
        if not self._in_steps:
            raise self._request
        _say(f"\n{name}: finishing this step and saving; once more ends at once\n")


_listening: list[StopRequests] = []


def _block_sigterm() -> None:
    if _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock_sigterm() -> None:
    if _listening:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _release_sigterm() -> None:
    for stop in _listening:
        stop.release_sigterm()
    _unblock_sigterm()


# The handler is not enough: Python drops signals that a child receives before it is fully forked,
# and calls no handler in a child that waits in C code.
os.register_at_fork(
    before=_block_sigterm, after_in_parent=_unblock_sigterm, after_in_child=_release_sigterm
)


def _say(line: str) -> None:
    # Not by a logger or print: the signal may have interrupted one in the middle of a line.
    os.write(2, line.encode())

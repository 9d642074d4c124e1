"""Calls on daemon threads: neither other calls nor the end of the process waits for one that
hangs."""

import contextvars
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Calls = queue.SimpleQueue[Callable[[], None] | None]


class Background:
    """A thread that makes calls one after the other. They compute as they would on the thread that
    asks for them: torch keeps whether gradients are recorded, the current GPU and, through OpenMP,
    the number of threads for each thread apart."""

    def __init__(self, name: str) -> None:
        self._calls: Calls = queue.SimpleQueue()
        threading.Thread(target=_make, args=(self._calls,), name=name, daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """What the call will give or raise."""
        future: Future[T] = Future()
        settings, context = _torch_settings(), contextvars.copy_context()

        def make() -> None:
            settings()
            try:
                result = context.run(call)
            except BaseException as error:  # for the one who waits, SystemExit included
                future.set_exception(error)
            else:
                future.set_result(result)

        self._calls.put(make)
        return future


def _torch_settings() -> Callable[[], Any]:
    """Sets another thread's torch as this one's is."""
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def apply() -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        if gpu is not None:
            torch.cuda.set_device(gpu)

    return apply


def _make(calls: Calls) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # it holds what it was given and what it gave until the next comes

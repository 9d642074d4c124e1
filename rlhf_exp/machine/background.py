"""Calls on daemon threads: a call that hangs delays neither other calls nor the process's exit."""

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
    """A thread that runs calls one after the other, with the torch settings of the thread that
    submits them: torch keeps the gradient mode, the current GPU and, through OpenMP, the number of
    threads separately for each thread."""

    def __init__(self, name: str) -> None:
        self._calls: Calls = queue.SimpleQueue()
        threading.Thread(target=_make, args=(self._calls,), name=name, daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """A future of the call's result or exception."""
        future: Future[T] = Future()
        settings, context = _torch_settings(), contextvars.copy_context()

        def make() -> None:
            settings()
            try:
                result = context.run(call)
            except BaseException as error:  # SystemExit too is raised where the result is awaited
                future.set_exception(error)
            else:
                future.set_result(result)

        self._calls.put(make)
        return future


def _torch_settings() -> Callable[[], Any]:
    """A function that gives the thread that calls it the torch settings of this thread."""
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
        del call  # it would keep its arguments and result in memory until the next call

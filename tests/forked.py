"""Commands of train.py in processes forked from one that has imported the libraries: they begin
within a fraction of a second, where a new process imports them for seconds."""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
from hydra._internal.hydra import Hydra

from rlhf_exp.sweeps.isolation import PRELOADED

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def compose_once() -> None:
    """Hydra composes each configuration twice, the first time to read hydra.mode, which nothing
    sets."""
    Hydra.get_mode = lambda self, config_name, overrides: None  # type: ignore[method-assign]


class Command:
    """`python train.py WORDS` in a folder, in a process group of its own, as under a terminal. It
    is killed at the end of the `with` block if it still runs. It ignores the signals `ignore`."""

    def __init__(
        self,
        folder: Path,
        *words: str,
        environment: Mapping[str, str],
        ignore: Sequence[signal.Signals] = (),
    ) -> None:
        self.log = folder.with_name(f"{folder.name}.said")
        context: BaseContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        arguments = (folder, words, dict(environment), tuple(ignore), self.log)
        self.process = context.Process(target=_train, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()

    def wait(self, timeout: float = 200.0) -> int:
        """The exit code, minus the signal's number if one ended it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, self.said()
        return self.process.exitcode

    def await_that(self, holds: Callable[[], bool]) -> None:
        """Waits, as long as the process lives."""
        deadline = time.monotonic() + 100
        while not holds():
            assert self.process.is_alive(), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def said(self) -> str:
        """What it has written to standard output and standard error."""
        return self.log.read_text() if self.log.exists() else ""


def _train(
    folder: Path,
    words: tuple[str, ...],
    environment: dict[str, str],
    ignore: tuple[signal.Signals, ...],
    log: Path,
) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for ignored in ignore:
        signal.signal(ignored, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    compose_once()
    sys.argv = [str(TRAIN), *words]
    runpy.run_path(str(TRAIN), run_name="__main__")

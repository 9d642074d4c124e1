"""Runs of train.py in processes of their own into which faults are put, for tests of what is
promised when they happen."""

import importlib
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from rlhf_exp.sweeps.isolation import call_in_process
from tests.forked import TRAIN, compose_once

OFFLINE = {
    "WANDB_MODE": "disabled",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "HYDRA_FULL_ERROR": "",
}

# A fault is put into the process before train.py begins; it may start threads and replace functions
# of the standard library, never ours.
Fault = Callable[[Path], None]


def no_fault(folder: Path) -> None:
    """Lets the run be."""


class KillAtFileOperation:
    """SIGKILL just before the operation of that number, from 1, that changes files in the run's
    folder: a rename, a removal, a truncation, a flush to the disk. Counts them in a file beside the
    folder."""

    NAMES = ("replace", "rename", "unlink", "rmdir", "truncate", "fsync", "mkdir", "open")

    def __init__(self, number: int | None) -> None:
        self.number = number

    def __call__(self, folder: Path) -> None:
        """Replaces the functions of os that do so."""
        where, lock = str(folder.resolve()), threading.Lock()
        count = [0]
        for name in self.NAMES:
            setattr(os, name, self._counting(getattr(os, name), name, where, count, lock))

    def _counting(
        self, function: Any, name: str, where: str, count: list[int], lock: threading.Lock
    ) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            if name == "fsync" or (given and where in os.path.abspath(os.fspath(given[0]))):
                with lock:
                    count[0] += 1
                    Path(f"{where}.operations").write_text(str(count[0]))
                    if count[0] == self.number:
                        os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return call


class SignalAtPhase:
    """A signal, `delay_s` after metrics.jsonl has the row of a phase; at once for phase None."""

    def __init__(
        self, phase: int | None, *, delay_s: float = 0.0, name: str = "SIGKILL", twice: bool = False
    ) -> None:
        self.phase, self.delay_s, self.name, self.twice = phase, delay_s, name, twice

    def __call__(self, folder: Path) -> None:
        """Starts to watch."""
        if self.phase is None:
            threading.Thread(target=self._send, daemon=True).start()
        else:
            at_phase(folder, self.phase, self._send)

    def _send(self) -> None:
        time.sleep(self.delay_s)
        for _ in range(1 + self.twice):
            os.kill(os.getpid(), getattr(signal, self.name))
            time.sleep(0.05)


class SmallFiles:
    """No file may grow beyond so many bytes, as where a quota is used up."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, folder: Path) -> None:
        """Sets the limit, which Python meets as OSError."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


class FullDiskAtPhase:
    """From the row of a phase on, metrics.jsonl cannot be written: it leads to a disk that is
    full. What it held is beside it."""

    def __init__(self, phase: int) -> None:
        self.phase = phase

    def __call__(self, folder: Path) -> None:
        """Starts to watch."""
        file = folder / "metrics.jsonl"

        def fill() -> None:
            file.rename(file.with_suffix(".kept"))
            file.symlink_to("/dev/full")

        at_phase(folder, self.phase, fill)


class KillWandbAtPhase:
    """SIGKILL to W&B's service, once metrics.jsonl has the row of a phase."""

    def __init__(self, phase: int) -> None:
        self.phase = phase

    def __call__(self, folder: Path) -> None:
        """Starts to watch."""
        os.environ["WANDB_MODE"] = "offline"

        def kill() -> None:
            for process in psutil.Process().children(recursive=True):
                if process.name().startswith("wandb-"):
                    process.kill()
                    folder.with_name("killed").touch()

        at_phase(folder, self.phase, kill)


class KillArtifactAtUpdate:
    """SIGKILL, once a step of `prepare` has a checkpoint of that update or a later one."""

    def __init__(self, step: str, update: int) -> None:
        self.step, self.update = step, update

    def __call__(self, folder: Path) -> None:
        """Starts to watch."""

        def found() -> bool:
            made = folder.parent.glob(f"artifacts/.{self.step}-*.partial/checkpoints/phase-*")
            return any(int(path.name[-6:]) >= self.update for path in made)

        kill_once(found)


class KillAtCheckpoints:
    """SIGKILL, once the run has so many whole checkpoints."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, folder: Path) -> None:
        """Starts to watch."""

        kill_once(lambda: len([*folder.glob("checkpoints/phase-*")]) >= self.count)


class Broken:
    """A method of a library raises, SystemExit if `exits`."""

    def __init__(self, module: str, kind: str, method: str, *, exits: bool = False) -> None:
        self.module, self.kind, self.method, self.exits = module, kind, method, exits

    def __call__(self, folder: Path) -> None:
        """Replaces it."""

        def fail(*_: Any, **__: Any) -> None:
            raise SystemExit(1) if self.exits else RuntimeError("broken by a test")

        setattr(getattr(importlib.import_module(self.module), self.kind), self.method, fail)


class FullDiskWhenDone:
    """Once status.json says done, no file can be written any more."""

    def __call__(self, folder: Path) -> None:
        """Watches the renames by which files come into being."""
        replace = os.replace

        def call(source: Any, target: Any, **named: Any) -> None:
            replace(source, target, **named)
            if Path(target).name == "status.json" and "done" in Path(target).read_text():
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

        os.replace = call


class ClosedPipe:
    """Standard output and standard error are a pipe that nobody reads."""

    def __call__(self, folder: Path) -> None:
        """Replaces what the process writes to."""
        read, write = os.pipe()
        os.close(read)
        for stream in (1, 2):
            os.dup2(write, stream)


class SignalWhenDone:
    """A signal as soon as status.json says done, while figures are drawn."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, folder: Path) -> None:
        """Watches the renames by which files come into being."""
        replace = os.replace

        def call(source: Any, target: Any, **named: Any) -> None:
            replace(source, target, **named)
            if Path(target).name == "status.json" and "done" in Path(target).read_text():
                os.kill(os.getpid(), getattr(signal, self.name))

        os.replace = call


class Threads:
    """So many threads compute."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, folder: Path) -> None:
        """Sets torch's."""
        torch.set_num_threads(self.number)


def at_phase(folder: Path, phase: int, act: Callable[[], None]) -> None:
    """Has a thread act as soon as metrics.jsonl has the row of a phase."""
    file, row = folder / "metrics.jsonl", f'{{"phase": {phase}, '

    def has_row() -> bool:
        try:
            return row in file.read_text()
        except FileNotFoundError:  # not yet, or cleared by a run that begins anew
            return False

    act_once(has_row, act)


def kill_once(holds: Callable[[], bool]) -> None:
    """Has a thread kill this process as soon as the condition holds."""
    act_once(holds, lambda: os.kill(os.getpid(), signal.SIGKILL))


def act_once(holds: Callable[[], bool], act: Callable[[], None]) -> None:
    """Has a thread act as soon as the condition holds."""

    def watch() -> None:
        while not holds():
            time.sleep(0.0005)
        act()

    threading.Thread(target=watch, daemon=True).start()


def clock_backwards(folder: Path) -> None:
    """Has the time of day fall by a minute at every look at it, and begin next week."""
    real, looks = time.time, [0]

    def now() -> float:
        looks[0] += 1
        return real() + 604_800 - 60 * looks[0]

    time.time = now


def run(
    folder: Path, words: Sequence[str], *, fault: Fault = no_fault, cwd: Path | None = None
) -> int:
    """`python train.py WORDS`, which runs in `folder`, in a process of its own forked from one that
    has imported the libraries; its exit code, which is minus the number of the signal that killed
    it. What it says is appended to FOLDER.out."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.out")
    return call_in_process(_train, folder, [*words], fault, cwd or folder.parent, log=log)


def _train(folder: Path, words: list[str], fault: Fault, cwd: Path) -> None:
    os.chdir(cwd)
    os.environ.update(OFFLINE)
    torch.set_num_threads(1)
    compose_once()
    sys.argv = [str(TRAIN), *words]
    fault(folder)
    runpy.run_path(str(TRAIN), run_name="__main__")


def begin_or_go_on(folder: Path, words: Sequence[str], *, fault: Fault = no_fault) -> int:
    """`run` by the one command that begins a run and goes on with it."""
    return run(folder, [*words, f"hydra.run.dir={folder}", "resume=auto"], fault=fault)


def said(folder: Path) -> str:
    """What the runs in the folder have said."""
    return folder.with_name(f"{folder.name}.out").read_text(errors="replace")

"""Hydra's part of starting a sweep's jobs: composes, checks and launches them."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from rlhf_exp.app import run
from rlhf_exp.app.user_modules import import_from_config_folders
from rlhf_exp.machine.locations import script_command
from rlhf_exp.machine.slurm import requeue
from rlhf_exp.runs.config_keys import use_of
from rlhf_exp.runs.files import write_whole
from rlhf_exp.runs.lock import is_locked, locked
from rlhf_exp.runs.paths import forget_status
from rlhf_exp.runs.status import read_state
from rlhf_exp.security.printable import printable
from rlhf_exp.security.redaction import redact_words, scrub
from rlhf_exp.settings import ConfigError
from rlhf_exp.sweeps.dead_jobs import await_and_mark, await_end, mark_dead, mark_failed, unreported
from rlhf_exp.sweeps.expected_time import expected_seconds, finished_runs
from rlhf_exp.sweeps.isolation import SWEEP_PID
from rlhf_exp.sweeps.jobs import (
    RECORD,
    BadJobs,
    SweepJob,
    identity,
    read_record,
    write_record,
)
from rlhf_exp.sweeps.monitor import Monitor, problems, summary

SWEEP_WORDS = ("skip_completed=", "dry_run=")  # words for the sweep, not for its jobs
OF_THE_SWEEP = ("launcher", "sweeper", "sweep")  # parts of Hydra's configuration
MANY = 20  # jobs; checking so many takes long enough for a message


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The properties of a launcher. `at_once`: the number of jobs that it runs at a time; `counts`:
    it enforces that limit itself; `keeps`: a waiting job may still start after the launcher fails;
    `here`: its processes run on this machine."""

    at_once: int
    counts: bool = True
    keeps: bool = False
    here: bool = True


class Launching:
    """Checks and launches the jobs of one sweep, in the sweep's own folder."""

    def __init__(self, context: HydraContext, function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config = context, config
        self.kind = _kind(config)
        import_from_config_folders(config.hydra)  # the jobs are checked in this process
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=function, config=config
        )
        self.folder = Path(str(config.hydra.sweep.dir))
        self.dry_run, self.skip_completed = bool(config.dry_run), bool(config.skip_completed)
        self.console = Console()

    def say(self, line: str) -> None:
        """Prints a line without wrapping it, and without secrets."""
        self.console.print(Text(printable(scrub(line))), soft_wrap=True)

    def parse(self, params: Mapping[str, Any], arguments: Sequence[str]) -> list[Override]:
        """A sweeper's params, then the overrides of the command line for jobs. Raises ConfigError
        for a sweep over a key that does not affect results."""
        words = [*(f"{key}={value}" for key, value in params.items()), *arguments]
        parser = OverridesParser.create(config_loader=self._context.config_loader)
        words = [word for word in words if not word.lstrip("+").startswith(SWEEP_WORDS)]
        overrides = parser.parse_overrides(words)
        for override in overrides:
            key = override.get_key_element().lstrip("+~")
            if override.is_sweep_override() and not use_of(key, {}).results:
                raise ConfigError(f"{key}: the jobs would be the same; give it one value")
        return overrides

    def check(
        self,
        jobs: Sequence[tuple[Sequence[str], Sequence[str]]],
        *,
        metrics: Sequence[str] = (),
    ) -> list[SweepJob]:
        """The checked jobs. Each input is a job's words and the swept ones among them. Raises
        BadJobs with all jobs that cannot run or lack one of the metrics."""
        if len(jobs) >= MANY:
            self.say(f"checking {len(jobs)} jobs")
        checked: list[SweepJob] = []
        problems: dict[str, list[str]] = {}
        runs = Path(str(self._config.hydra.run.dir)).parent.parent
        finished = finished_runs(runs, self.folder) if self.dry_run else []
        for number, (words, swept) in enumerate(jobs):
            job = SweepJob(overrides=tuple(words), swept=tuple(swept), identity="", phases=None)
            try:
                plan = run.check(
                    self._compose(words),
                    self.folder / str(number),  # its folder is named once all are checked
                    words,
                    sweep=True,
                    here=self.kind.here,
                    metrics=metrics,
                )
            except (ConfigError, HydraException, OmegaConfBaseException) as error:
                for line in (run.explain(error) or str(error)).splitlines():
                    problems.setdefault(line, []).append(f"job {number} ({job.label})")
                continue
            config = plan.config
            phases = config["stage"].get("total_phases")
            seconds = expected_seconds(config, finished)
            checked.append(replace(job, identity=identity(config), phases=phases, seconds=seconds))
        if problems:
            raise BadJobs(problems, len(jobs))
        return checked

    def _compose(self, words: Sequence[str]) -> DictConfig:
        config = self._context.config_loader.load_sweep_config(self._config, list(words))
        for part in OF_THE_SWEEP:
            job, sweep = (OmegaConf.to_container(c.hydra[part]) for c in (config, self._config))
            if job != sweep:
                raise ConfigError(
                    f"hydra.{part} applies to the whole sweep, so a swept experiment cannot set it:"
                    " set it on the command line"
                )
        with open_dict(config):
            del config["hydra"]
        return config

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Locks the sweep's folder within the block. Raises ConfigError if the folder holds a sweep
        and skip_completed is false, if skip_completed has no folder, and if jobs of the sweep are
        running."""
        if self.skip_completed and not read_record(self.folder):
            self._refuse_new_folder()
        with locked(self.folder):
            recorded_jobs = read_record(self.folder)
            if recorded_jobs and not self.skip_completed:
                raise ConfigError(
                    f"hydra.sweep.dir={self.folder} holds a sweep already: add skip_completed=true"
                    " to run what is missing there, or name another folder"
                )
            running = [job for job in recorded_jobs if is_locked(job.folder)]
            if running:
                raise ConfigError(
                    f"job {running[0].number} in {running[0].folder} is still running: wait for it,"
                    " or stop it"
                )
            yield

    def _refuse_new_folder(self) -> None:
        if any(word.startswith("hydra.sweep.dir=") for word in self._config.hydra.overrides.hydra):
            return  # the same command starts the sweep and completes it
        old = sorted(self.folder.parent.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime)
        hint = f"; the newest is {old[-1].parent}" if old else ""
        raise ConfigError(
            "skip_completed=true needs the folder of the sweep to complete:"
            f" hydra.sweep.dir=FOLDER{hint}"
        )

    def run(self, jobs: Sequence[SweepJob], *, batch_size: int | None, title: str = "") -> None:
        """Launches placed jobs, at most `batch_size` at a time, and returns when all have ended,
        done or not."""
        write_record(self.folder, jobs, command=sys.argv)
        write_whole(self.folder / "multirun.yaml", run.to_yaml(self._config))
        for job in jobs:
            forget_status(job.folder)
        size = batch_size or max(1, len(jobs))
        if not self.kind.counts:
            size = batch_size or self.kind.at_once
            share = max(1, (os.cpu_count() or 1) // size)
            os.environ.setdefault("OMP_NUM_THREADS", str(share))
        if self.kind.here and not self.kind.keeps:
            os.environ[SWEEP_PID] = str(os.getpid())  # jobs end when it ends
        try:
            with _signals_interrupt(), Monitor(jobs, self.console, title=title):
                for begin in range(0, len(jobs), size):
                    self._launch(jobs[begin : begin + size])
        except (KeyboardInterrupt, SystemExit) as stopped:
            await_and_mark(jobs, "interrupted")
            self.console.print(summary(jobs))
            self.say_how_to_go_on()
            if stopped.args == (128 + signal.SIGUSR1,):
                requeue()
            raise

    def _launch(self, jobs: Sequence[SweepJob]) -> None:
        retried: set[int] = set()
        while jobs:
            broken = False
            words = [[*job.overrides, f"hydra.sweep.subdir='{job.folder.name}'"] for job in jobs]
            try:
                returned = self._launcher.launch(words, initial_job_idx=jobs[0].number)
                for job, result in zip(jobs, returned, strict=True):
                    if result.status == JobStatus.FAILED:
                        # Not return_value, which raises and prints.
                        mark_failed(job, result._return_value)
            except Exception as error:  # the launcher's; jobs handle their own errors
                self.say(f"launcher: {type(error).__name__}: {error}")
                broken = True
            await_end(jobs)
            # A broken pool also ends jobs that did not break it: retry these once.
            innocent = [j for j in unreported(jobs) if broken and j.number not in retried]
            if self.kind.keeps:
                innocent = []
            for job in innocent:
                retried.add(job.number)
                forget_status(job.folder)
            mark_dead(jobs, "failed")
            left = [job for job in jobs if read_state(job.folder).status == "waiting"]
            if self.kind.keeps or (len(left) == len(jobs) and not innocent):
                return
            jobs = left

    def conclude(self, jobs: Sequence[SweepJob]) -> None:
        """Prints how the jobs ended and the next command. Raises AlreadySaid if one is not done."""
        self.console.print(summary(jobs))
        undone = problems(jobs)
        for line in undone:
            self.say(line)
        self.say(f"compare them: {script_command('compare', str(self.folder))}")
        if undone:
            self.say_how_to_go_on()
            raise run.AlreadySaid(1)

    def say_how_to_go_on(self) -> None:
        """Prints the command that completes the sweep."""
        replaced = ("hydra.sweep.dir=", "skip_completed=")
        words = [word for word in sys.argv if not word.startswith(replaced)]
        words += [f"hydra.sweep.dir={self.folder}", "skip_completed=true"]
        python = ["python"] if sys.argv[0].endswith(".py") else []  # else it is the console script
        self.say(f"run what is missing: {shlex.join([*python, *redact_words(words)])}")


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Within the block SIGTERM, a queue's SIGUSR1 and a closed terminal end the sweep as Ctrl-C
    does, with their own exit codes."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        if signal.getsignal(number) != signal.SIG_IGN  # as under nohup
    ]
    previous_handlers = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _kind(config: DictConfig) -> Kind:
    """The properties of the chosen launcher. Raises ConfigError if it would by default run as many
    jobs as there are cores."""
    launcher, cores = config.hydra.launcher, os.cpu_count() or 1
    target = str(launcher.get("_target_"))
    if "hydra_joblib_launcher" in target:
        words = [w for w in config.hydra.overrides.hydra if w.startswith("hydra.launcher.n_jobs=")]
        if launcher.n_jobs == -1 and not words:
            raise ConfigError(
                "hydra/launcher=joblib starts as many jobs as there are cores, each with its own"
                " model: set the number, hydra.launcher.n_jobs=2"
            )
        return Kind(at_once=int(launcher.n_jobs) if launcher.n_jobs > 0 else cores)
    if "SlurmLauncher" in target:
        return Kind(at_once=int(launcher.array_parallelism), keeps=True, here=False)
    if "LocalLauncher" in target:  # submitit's; it starts all of its jobs at once
        at_once = int(config.hydra.sweeper.max_batch_size or cores)
        return Kind(at_once=at_once, counts=False, keeps=True)
    if "hydra_ray_launcher" in target:
        return Kind(at_once=cores, here=False)
    return Kind(at_once=1)

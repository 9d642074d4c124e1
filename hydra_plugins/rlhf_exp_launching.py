"""Hydra's part of starting a sweep's jobs: composes, checks and launches them."""

import copy
import os
import re
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
from rlhf_exp.app.overrides import quote
from rlhf_exp.app.user_modules import import_from_config_folders
from rlhf_exp.machine.locations import script_command
from rlhf_exp.machine.slurm import requeue
from rlhf_exp.runs.config_keys import AUTO_GPUS, OF_A_SWEEP, read_sweep_settings, use_of
from rlhf_exp.runs.files import write_whole
from rlhf_exp.runs.lock import is_locked, locked
from rlhf_exp.runs.paths import forget_status
from rlhf_exp.runs.status import read_state
from rlhf_exp.security.printable import printable
from rlhf_exp.security.redaction import redact_words, scrub
from rlhf_exp.settings import ConfigError
from rlhf_exp.sweeps.dead_jobs import (
    FAIL_FAST,
    await_and_mark,
    await_end,
    mark_dead,
    mark_failed,
    unreported,
)
from rlhf_exp.sweeps.expected_time import expected_seconds, finished_runs
from rlhf_exp.sweeps.isolation import SWEEP_PID
from rlhf_exp.sweeps.jobs import (
    RECORD,
    STOP,
    BadJobs,
    SweepJob,
    identity,
    read_record,
    write_record,
)
from rlhf_exp.sweeps.leases import GPUS, JOBS_PER_GPU, find_gpus
from rlhf_exp.sweeps.monitor import Monitor, problems, summary

OWN_KEYS = (*OF_A_SWEEP, "dry_run")  # keys of the sweep, not of its jobs
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
        self._own_words: list[str] = []
        plain: Any = OmegaConf.to_container(config)
        self.settings = read_sweep_settings(plain)
        self._gpus = find_gpus(self.settings.gpus)
        self.kind = _kind(config, leases=len(self._gpus) * self.settings.jobs_per_gpu)
        if self.settings.gpus and not self.kind.here:
            raise ConfigError(
                "gpus: jobs of this launcher run elsewhere and get their GPUs from it; leave it out"
                " (SLURM: hydra.launcher.gpus_per_node)"
            )
        import_from_config_folders(config.hydra)  # the jobs are checked in this process
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context,
            task_function=function,
            config=_with_number_of_jobs(config, self.kind.at_once),
        )
        self.folder = Path(str(config.hydra.sweep.dir))
        self.dry_run, self.skip_completed = bool(config.dry_run), self.settings.skip_completed
        self.console = Console()

    def say(self, line: str) -> None:
        """Prints a line without wrapping it, and without secrets."""
        self.console.print(Text(printable(scrub(line))), soft_wrap=True)

    def parse(self, params: Mapping[str, Any], arguments: Sequence[str]) -> list[Override]:
        """A sweeper's params, then the overrides of the command line for jobs. Raises ConfigError
        for a sweep over a key that does not affect results."""
        words = [*(f"{key}={value}" for key, value in params.items()), *arguments]
        parser = OverridesParser.create(config_loader=self._context.config_loader)
        overrides = parser.parse_overrides(words)
        for override in overrides:
            key = override.key_or_group
            if override.is_sweep_override() and not use_of(key, {}).results:
                raise ConfigError(f"{key}: the jobs would be the same; give it one value")
        self._own_words = [str(o.input_line) for o in overrides if o.key_or_group in OWN_KEYS]
        return [override for override in overrides if override.key_or_group not in OWN_KEYS]

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
        words = [*words, *self._own_words]
        config = self._context.config_loader.load_sweep_config(self._config, words)
        for part in OF_THE_SWEEP:
            job, sweep = (OmegaConf.to_container(c.hydra[part]) for c in (config, self._config))
            if job != sweep:
                raise ConfigError(
                    f"hydra.{part} applies to the whole sweep, so a swept experiment cannot set it:"
                    " set it on the command line"
                )
        for key in OF_A_SWEEP:
            if config[key] != self._config[key]:
                raise ConfigError(
                    f"{key} applies to the whole sweep, so a swept experiment cannot set it: set it"
                    " on the command line"
                )
        if self._gpus and re.fullmatch(r"cuda:0*[1-9]\d*", str(config.device)):
            raise ConfigError(
                f"device={config.device}: a job sees only the GPU that it leases: use device=auto"
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
            (self.folder / STOP).unlink(missing_ok=True)
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
                    if not self.has_stopped:
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
            own = self._variables()
            words = [
                [*job.overrides, f"hydra.sweep.subdir='{job.folder.name}'", *own] for job in jobs
            ]
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
            if self.has_stopped or self.kind.keeps or (len(left) == len(jobs) and not innocent):
                return
            jobs = left

    @property
    def has_stopped(self) -> bool:
        """True once a job has failed with fail_fast=true."""
        return (self.folder / STOP).exists()

    def say_gpus(self) -> None:
        """Prints which GPUs the jobs lease, if they were asked to."""
        number = self.settings.jobs_per_gpu
        if self._gpus:
            each = "one job" if number == 1 else f"up to {number} jobs"
            self.say(f"GPUs: {', '.join(self._gpus)}, {each} on each")
        elif self.settings.gpus == AUTO_GPUS:
            self.say("gpus=auto: CUDA sees no GPU here, so the jobs lease none")

    def _variables(self) -> list[str]:
        """The words that set the environment variables of jobs."""
        values = {}
        if self._gpus:
            values[GPUS] = ",".join(self._gpus)
            values[JOBS_PER_GPU] = str(self.settings.jobs_per_gpu)
        if self.settings.fail_fast:
            values[FAIL_FAST] = "1"
        return [f"+hydra.job.env_set.{name}={quote(value)}" for name, value in values.items()]

    def conclude(self, jobs: Sequence[SweepJob]) -> None:
        """Prints how the jobs ended and the next command. Raises AlreadySaid if one is not done."""
        self.console.print(summary(jobs))
        undone = problems(jobs)
        for line in undone:
            self.say(line)
        if self.has_stopped:
            self.say("fail_fast=true: the first failure stopped the sweep")
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


def _with_number_of_jobs(config: DictConfig, number: int) -> DictConfig:
    """The configuration for the launcher; joblib's has a number of jobs where the user set none."""
    if config.hydra.launcher.get("n_jobs") != -1:
        return config
    config = copy.deepcopy(config)
    config.hydra.launcher.n_jobs = number
    return config


def _kind(config: DictConfig, *, leases: int) -> Kind:
    """The properties of the chosen launcher, whose jobs can hold so many leases of GPUs, 0 if they
    take none. Raises ConfigError if it would by default run as many jobs as there are cores."""
    launcher, cores = config.hydra.launcher, os.cpu_count() or 1
    target = str(launcher.get("_target_"))
    if "hydra_joblib_launcher" in target:
        words = [w for w in config.hydra.overrides.hydra if w.startswith("hydra.launcher.n_jobs=")]
        if launcher.n_jobs == -1 and not words and leases:
            return Kind(at_once=leases)
        if launcher.n_jobs == -1 and not words:
            raise ConfigError(
                "hydra/launcher=joblib starts as many jobs as there are cores, each with its own"
                " model: set the number, hydra.launcher.n_jobs=2"
            )
        at_once = int(launcher.n_jobs) if launcher.n_jobs > 0 else cores
        return Kind(at_once=min(at_once, leases or at_once))
    if "SlurmLauncher" in target:
        return Kind(at_once=int(launcher.array_parallelism), keeps=True, here=False)
    if "LocalLauncher" in target:  # submitit's; it starts all of its jobs at once
        at_once = int(config.hydra.sweeper.max_batch_size or leases or cores)
        return Kind(at_once=at_once, counts=False, keeps=True)
    if "hydra_ray_launcher" in target:
        return Kind(at_once=cores, here=False)
    return Kind(at_once=1)

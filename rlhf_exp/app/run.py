"""The composition root: from a composed configuration to running stages.

All settings are built and checked first, in milliseconds; weights are loaded after that. Modules
that import torch are imported inside functions, so that `--help` and `--cfg` answer at once.
"""

import functools
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp.app import hydra_errors
from rlhf_exp.app.instantiate import ALLOWED_TARGETS, instantiate
from rlhf_exp.app.options import list_groups
from rlhf_exp.app.overrides import command, program, quote_paths
from rlhf_exp.app.own_model import suited_lr, suited_warmup
from rlhf_exp.app.resume import (
    AUTO,
    Change,
    apply_changes,
    can_continue,
    check_allowed,
    check_changes,
    find_changes,
    key_of,
    recorded_words,
    run_dir,
    with_recorded_words,
)
from rlhf_exp.app.user_modules import import_from_config_folders
from rlhf_exp.machine.locations import CONF
from rlhf_exp.machine.streams import make_streams_unbreakable
from rlhf_exp.runs.config_keys import OF_ONE_START, read_run_settings
from rlhf_exp.runs.files import write_whole
from rlhf_exp.runs.lock import locked
from rlhf_exp.runs.paths import CONFIG, HYDRA, LOCK, OVERRIDES, RESUMED, is_run, is_unused
from rlhf_exp.runs.status import is_done, read_state, write_status
from rlhf_exp.security.printable import printable
from rlhf_exp.security.redaction import (
    redact,
    redact_words,
    redacted_keys,
    remember,
    remember_environment,
    remember_words,
    scrub,
    scrub_logs,
    scrub_tracebacks,
)
from rlhf_exp.settings import ConfigError
from rlhf_exp.sweeps.dead_jobs import report_exit
from rlhf_exp.sweeps.expected_time import expected_seconds, finished_runs
from rlhf_exp.sweeps.isolation import call_in_process
from rlhf_exp.sweeps.jobs import STOP, BadJobs
from rlhf_exp.sweeps.leases import leased_gpu
from rlhf_exp.tracking.progress import keep_log

if TYPE_CHECKING:
    from rlhf_exp.app.experiment import Job, Plan
    from rlhf_exp.app.steps import Instantiate
    from rlhf_exp.runs.stopping import StopRequests

log = logging.getLogger(__name__)

OmegaConf.register_new_resolver("groups", list_groups, replace=True)
OmegaConf.register_new_resolver("program", program, replace=True)
OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
OmegaConf.register_new_resolver("suited_lr", suited_lr, replace=True)
OmegaConf.register_new_resolver("suited_warmup", suited_warmup, replace=True)
OmegaConf.register_new_resolver(
    "run_id", lambda: secrets.token_hex(3), use_cache=True, replace=True
)


def execute(cfg: DictConfig, path: Path, stop: "StopRequests | None" = None) -> None:
    """Checks the whole configuration, prepares its artifacts, and runs its stage. `stop` can end
    it early."""
    from rlhf_exp.app.experiment import run_experiment
    from rlhf_exp.machine.cpu_settings import use_processor_well
    from rlhf_exp.machine.timing import PROCESS_BEGAN
    from rlhf_exp.runs.checkpoint import has_checkpoint

    words = _words()
    resumed = _read_resumed(cfg, path) if cfg.get("resume") else None
    resumed_or_new = resumed.config if resumed else cfg
    if cfg.get("dry_run"):
        _say_plan(check(resumed_or_new, path, words, sweep=False), path)
        return
    use_processor_well()
    # A job of a sweep returns to its folder after a preemption or with skip_completed.
    resume = bool(resumed) or (_is_sweep() and has_checkpoint(path))
    config = to_container(resumed_or_new)
    job, instantiate = _read(config, path, words, sweep=_is_sweep(), resume=resume)
    if stop is not None:
        job = replace(job, stop=stop)
        if config["max_minutes"] is not None:
            began = time.monotonic() if _is_sweep() else PROCESS_BEGAN
            stop.limit(config["max_minutes"], began=began)
    if resumed is None or not resumed.changes:
        run_experiment(config, job, instantiate)
        return
    previous_files = {
        name: (path / name).read_text(encoding="utf-8") for name in (CONFIG, OVERRIDES)
    }

    def write_config() -> None:
        write_whole(path / OVERRIDES, to_yaml(OmegaConf.create([*resumed.words])))
        write_whole(path / CONFIG, to_yaml(resumed_or_new))

    try:
        run_experiment(config, replace(job, on_start=write_config), instantiate)
    except ConfigError as error:
        for name, text in previous_files.items():
            write_whole(path / name, text)
        changed = ", ".join(str(change) for change in resumed.changes)
        message = f"{error}\nthe configuration was changed for this start: {changed}"
        raise ConfigError(message) from error


def _say_plan(plan: "Plan", path: Path) -> None:
    config = plan.config
    seconds = expected_seconds(config, finished_runs(path.parent.parent))
    took = "how long it takes is unknown" if seconds is None else f"it takes about {seconds:.0f} s"
    stage = str(config["stage"]["_target_"]).rpartition(".")[2]
    steps = ", ".join([*config["prepare"], stage])
    facts = "; ".join((took, *plan.notes(), "nothing was started"))
    log.info("all is well: %s in %s; %s", steps, path, facts)
    if is_unused(path):  # only this call wrote to it
        shutil.rmtree(path)


def check(
    cfg: DictConfig,
    path: Path,
    words: Sequence[str],
    *,
    sweep: bool,
    here: bool = True,
    metrics: Sequence[str] = (),
) -> "Plan":
    """The plan of the job that the overrides `words` describe. `here`: it runs on
    this machine. `metrics`: names that its result must have. Raises ConfigError with everything
    that is wrong."""
    from rlhf_exp.app.experiment import check_experiment

    config = to_container(cfg)
    if sweep and config["resume"]:
        raise ConfigError("resume is for a single run: leave out -m, or use skip_completed=true")
    device = {} if here else {"device": "cpu"}
    job, instantiate = _read({**config, **device}, path, words, sweep=sweep, resume=False)
    return check_experiment(config, replace(job, metrics=metrics), instantiate)


def _read(
    config: Mapping[str, Any], path: Path, words: Sequence[str], *, sweep: bool, resume: bool
) -> tuple["Job", "Instantiate"]:
    from rlhf_exp.app.experiment import Job
    from rlhf_exp.runs.context import pick_device

    run_settings = read_run_settings(config, sweep=sweep)
    allowed = (*ALLOWED_TARGETS, *(f"{module}." for module in run_settings.allow_targets))
    job = Job(
        path=path,
        sweep=sweep,
        resume=resume,
        device=pick_device(run_settings.device),
        seed=run_settings.seed,
        prepare_seed=run_settings.prepare_seed,
        artifacts_dir=Path(run_settings.artifacts_dir),
        until=run_settings.until,
        # The groups that the command line sets, by an option or by a key.
        chosen=frozenset(re.split(r"[.=@]", word.lstrip("+"))[0] for word in words),
    )
    return job, functools.partial(instantiate, allowed=allowed)


def _words() -> list[str]:
    """The job's overrides as typed: Hydra's own list resolves interpolations in them."""
    if not HydraConfig.initialized():
        return []
    return OmegaConf.to_container(HydraConfig.get().overrides.task)  # type: ignore[return-value]


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """The configuration of a resumed run, its changes, and the overrides of the command lines that
    made it."""

    config: DictConfig
    changes: Sequence[Change]
    words: Sequence[str]


def _read_resumed(cfg: DictConfig, folder: Path) -> Resumed:
    """A run's own configuration with the changes of the command line. Raises ConfigError for a
    change that is not allowed, and for a run that is done and gets no more phases."""
    plain: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    hydra_errors.refuse_old_keys(plain, folder)
    previous_words = recorded_words(folder)
    words = [word for word in _words() if key_of(word) not in OF_ONE_START]
    differences: list[Change] = []
    if words != previous_words:
        # Composed again, since a word may choose another option of a group.
        old, new = (
            OmegaConf.to_container(hydra.compose("config", overrides=overrides))
            for overrides in (previous_words, words)
        )
        differences = find_changes(old, new)  # type: ignore[arg-type]
        check_allowed(cfg.resume_with, old, new)  # type: ignore[arg-type]
        check_changes(differences, [*cfg.resume_with, *redacted_keys(plain)], run=folder)
    if is_done(folder) and not can_continue(differences):
        raise ConfigError(
            f"resume={folder}: that run is done; give it more phases (or epochs), or another seed"
        )
    return Resumed(
        config=OmegaConf.create(apply_changes(plain, differences)), changes=differences, words=words
    )


def to_container(cfg: DictConfig) -> dict[str, Any]:
    """The configuration resolved to plain Python. Raises ConfigError naming each missing value, and
    for an interpolation of a key that does not exist."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError("\n".join(f"{key} is required: set {key}=..." for key in missing))
        config = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    remember(config)
    if hidden := redacted_keys(config):
        raise ConfigError("\n".join(f"{key} is kept out of files: set {key}=..." for key in hidden))
    return config  # type: ignore[return-value]


class AlreadySaid(Exception):
    """Ends a job or a sweep whose error is already printed; its argument is the exit code."""


def job(cfg: DictConfig) -> None:
    """Runs one job: a single run in this process, a job of a sweep in a separate process, so that
    a crash of one leaves the others running."""
    import_from_config_folders(HydraConfig.get())  # in whatever process a launcher runs this
    path = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    log_file = path / f"{HydraConfig.get().job.name}.log"
    keep_log(log_file, console=True)
    scrub_logs()
    logging.raiseExceptions = False  # on a full disk each line logged would print a traceback
    if not _is_sweep():
        try:
            _settle_resume(cfg, path)
        except ConfigError as error:
            log.error("error: %s", error)
            raise SystemExit(2) from None
        with locked(path):
            _write_configuration(cfg, path)
            attempt(cfg, path)
        return
    stop = path.parent / STOP
    if read_state(path).status == "done" or stop.exists():  # a preempting queue may start it again
        return
    _write_configuration(cfg, path)
    # Plain: some launchers' settings classes cannot be pickled.
    plain: Any = OmegaConf.to_container(HydraConfig.instance().cfg, resolve=True)  # type: ignore[arg-type]
    plain["hydra"]["overrides"]["task"] = _words()
    config = OmegaConf.to_container(cfg)
    code = call_in_process(_run_isolated, plain, config, path, log=log_file, stop_file=stop)
    report_exit(path, code)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise AlreadySaid(code)


def _settle_resume(cfg: DictConfig, path: Path) -> None:
    """Sets resume=auto to the folder if it holds a run, and to null if not. Raises ConfigError if a
    resumed run is in another folder, and if a new one's folder already holds a run."""
    if cfg.resume and str(cfg.resume) == AUTO:
        cfg.resume = str(path) if is_run(path) else None
    elif cfg.resume and Path(str(cfg.resume)).resolve() != path.resolve():
        raise ConfigError(
            f"resume={cfg.resume} goes on in that folder: leave out hydra.run.dir, or give"
            " resume=auto with it"
        )
    elif not cfg.resume and is_run(path):
        raise ConfigError(
            f"hydra.run.dir={path} holds a run already: name another folder, or go on with it:"
            f" {command(f'resume={path}')}"
        )


def _config_folder(cfg: DictConfig, path: Path) -> Path:
    return path / (RESUMED if cfg.get("resume") else HYDRA)


def _write_configuration(cfg: DictConfig, path: Path) -> None:
    """Writes Hydra's output_subdir files atomically and without secrets."""
    if cfg.get("dry_run"):
        return
    of_hydra: Any = HydraConfig.instance().cfg
    words = of_hydra.hydra.overrides.task
    # The configuration last: it marks a folder as a run's.
    for name, part in {"hydra": of_hydra, "overrides": words, "config": cfg}.items():
        write_whole(_config_folder(cfg, path) / f"{name}.yaml", to_yaml(part))


def to_yaml(config: DictConfig | ListConfig) -> str:
    """A configuration as YAML, unresolved and without secrets."""
    plain = redact(OmegaConf.to_container(config))
    if isinstance(plain, list):
        plain = redact_words(plain)
    elif "hydra" in plain:
        job, words = plain["hydra"]["job"], plain["hydra"]["overrides"]
        job["override_dirname"] = redact_words([job["override_dirname"]])[0]
        words.update({kind: redact_words(values) for kind, values in words.items()})
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _run_isolated(hydra_config: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    setup_globals()
    # The parent already prints to the console: keep only the file's handler.
    logs = hydra_config["hydra"]["job_logging"]
    if logs and logs.get("root"):
        logs["root"]["handlers"] = [*({"file"} & {*logs.get("handlers", {})})]
    hydra_cfg = OmegaConf.create(hydra_config)
    HydraConfig.instance().cfg = hydra_cfg  # type: ignore[assignment]
    configure_log(hydra_cfg.hydra.job_logging, hydra_cfg.hydra.verbose)
    keep_log(path / f"{hydra_cfg.hydra.job.name}.log", console=False)
    scrub_logs()
    with locked(path):
        attempt(OmegaConf.create(config), path)


def attempt(cfg: DictConfig, path: Path) -> None:
    """Runs a job and turns its errors into a message, a status and an exit code."""
    from rlhf_exp.app.exit_codes import handle_exit

    def undo() -> None:  # nothing ran, so nothing but the log is left behind
        shutil.rmtree(_config_folder(cfg, path), ignore_errors=True)
        (path / LOCK).unlink()

    with handle_exit(path, sweep=_is_sweep(), undo=undo) as stop, leased_gpu(cfg.device):
        if _is_sweep():
            write_status(path, "running")
        execute(cfg, path, stop)


def guard(main: Callable[[], None]) -> None:
    """Runs Hydra's main; prints its errors as a few lines with exit code 2, and keeps jobs' exit
    codes. With HYDRA_FULL_ERROR=1 in the environment every error keeps its traceback."""
    make_streams_unbreakable()
    remember_words(sys.argv)
    remember_environment()
    scrub_tracebacks()
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing
    words = ["dry_run=true" if word == "--dry-run" else word for word in sys.argv[1:]]
    try:
        # Before Hydra reads them: a word may belong to an option that the resumed run chose.
        sys.argv = [sys.argv[0], *with_recorded_words(quote_paths(words))]
        main()
    except AlreadySaid as failed:
        sys.exit(failed.args[0])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = None if full else explain(error)
        if message is None:
            raise
        from rlhf_exp.app.exit_codes import bounded

        text = message if isinstance(error, BadJobs) else bounded(message)
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


def explain(error: BaseException) -> str | None:
    """The user's mistake in a command line or a file, in a few lines without secrets; None for any
    other error."""
    message = hydra_errors.explain(error, CONF)
    return None if message is None else printable(scrub(message))

"""The composition root: from a composed configuration to running stages.

The only file of the package that knows Hydra and OmegaConf. All settings are built and checked
first, which takes milliseconds; weights are loaded after that. What imports torch is imported
inside functions, so that `--help` and `--cfg` answer at once.
"""

import difflib
import errno
import functools
import json
import logging
import os
import re
import secrets
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import pydantic
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from rlhf_exp.own_keys import read_own_keys
from rlhf_exp.settings import ConfigError, field_problem
from rlhf_exp.sweeps.estimate import expected_seconds, finished_runs
from rlhf_exp.sweeps.isolation import call_in_process, describe_end
from rlhf_exp.sweeps.jobs import BadJobs
from rlhf_exp.sweeps.state import read_state
from rlhf_exp.targets import forbidden_module, targets
from rlhf_exp.training.claims import LOCK, claimed, is_claimed

if TYPE_CHECKING:
    from rlhf_exp.experiment import Job
    from rlhf_exp.steps import Instantiate

log = logging.getLogger(__name__)

ALLOWED_TARGETS = ("rlhf_exp.", "torch.optim.")
UNWRITABLE = {errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST}
# Launchers that are packages of their own, and the extra that brings them.
LAUNCHERS = {"joblib": "parallel", "submitit_local": "slurm", "submitit_slurm": "slurm",
             "ray": "ray"}  # fmt: skip
CONF = Path(__file__).resolve().parents[1] / "conf"


def _run_dir(resume: str | None, otherwise: str) -> str:
    """The folder of a run: that of the run that is resumed, or a new one. Raises ConfigError if
    there is no such run."""
    if not resume:
        return otherwise
    if not all((Path(resume) / name).is_file() for name in (".hydra/config.yaml", "status.json")):
        raise ConfigError(f"resume={resume}: no run's folder, which has .hydra/ and status.json")
    return resume


OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
OmegaConf.register_new_resolver(
    "hydra_dir", lambda resume: ".hydra/resumed" if resume else ".hydra", replace=True
)
OmegaConf.register_new_resolver(
    "run_id", lambda: secrets.token_hex(3), use_cache=True, replace=True
)


def instantiate(
    config: Mapping[str, Any], path: str, problems: list[str], *, allowed: Sequence[str]
) -> Any:
    """The object that a group's configuration describes, or None with its problems appended."""
    if "_target_" not in config:
        problems.append(f"{path}: no option is chosen; choose one: {path.rpartition('.')[2]}=...")
        return None
    for target in targets(config):
        module = forbidden_module(target, tuple(allowed), ALLOWED_TARGETS, find=get_object)
        if module is not None:
            problems.append(
                f"{path}._target_={target} is outside of {', '.join(allowed)}; if you trust that"
                f" module, add it: allow_targets=[{module}]"
            )
            return None
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, pydantic.ValidationError):
            problems += [field_problem(path, detail) for detail in cause.errors()]
        elif isinstance(cause, ConfigError):
            problems.append(f"{path}: {cause}")
        else:
            reason = f" {cause}" if cause else ""
            problems.append(f"{path}: {str(error).splitlines()[0]}{reason}")
        return None


def execute(cfg: DictConfig, path: Path) -> None:
    """Checks the whole configuration, builds what the run stands on, and runs its stage."""
    from rlhf_exp.experiment import run_experiment
    from rlhf_exp.training.checkpoint import has_checkpoint
    from rlhf_exp.training.processor import use_processor_well

    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    resumed = cfg.get("resume")
    given = _config_of(Path(str(resumed))) if resumed else cfg
    if cfg.get("dry_run"):
        _say_plan(check(given, path, words, sweep=False), path)
        return
    use_processor_well()
    # A job of a sweep comes back to its folder if it was cut: by a queue or by skip_completed.
    resume = bool(resumed) or (_is_sweep() and has_checkpoint(path))
    config = to_container(given)
    run_experiment(config, *_read(config, path, words, sweep=_is_sweep(), resume=resume))


def _say_plan(config: Mapping[str, Any], path: Path) -> None:
    seconds = expected_seconds(config, finished_runs(path.parent.parent))
    took = "how long it takes is unknown" if seconds is None else f"it takes about {seconds:.0f} s"
    stage = str(config["stage"]["_target_"]).rpartition(".")[2]
    steps = ", ".join([*config["prepare"], stage])
    log.info("all is well: %s in %s; %s; nothing was started", steps, path, took)
    output = str(HydraConfig.get().output_subdir)
    if {file.name for file in path.iterdir()} == {output, "train.log", LOCK}:
        shutil.rmtree(path)  # nobody's but this call's
    elif output.endswith("resumed"):
        shutil.rmtree(path / output)


def check(
    cfg: DictConfig, path: Path, words: Sequence[str], *, sweep: bool, here: bool = True
) -> dict[str, Any]:
    """The resolved configuration of a job that `words` of the command line describe. `here` says
    that it is going to run on this machine. Raises ConfigError with everything that is wrong."""
    from rlhf_exp.experiment import check_experiment

    config = to_container(cfg)
    if sweep and config["resume"]:
        raise ConfigError("resume is for a single run: leave out -m, or use skip_completed=true")
    device = {} if here else {"device": "cpu"}
    check_experiment(config, *_read({**config, **device}, path, words, sweep=sweep, resume=False))
    return config


def _read(
    config: Mapping[str, Any], path: Path, words: Sequence[str], *, sweep: bool, resume: bool
) -> tuple["Job", "Instantiate"]:
    from rlhf_exp.experiment import Job
    from rlhf_exp.training.context import pick_device

    own = read_own_keys(config)
    if own.skip_completed and not sweep:
        raise ConfigError("skip_completed=true is for sweeps: add -m")
    allowed = (*ALLOWED_TARGETS, *(f"{module}." for module in own.allow_targets))
    job = Job(
        path=path,
        sweep=sweep,
        resume=resume,
        device=pick_device(own.device),
        seed=own.seed,
        prepare_seed=own.prepare_seed,
        artifacts_dir=Path(own.artifacts_dir),
        until=own.until,
        # The groups that the command line sets, wholly or by a key.
        chosen=frozenset(re.split(r"[.=@]", word.lstrip("+"))[0] for word in words),
    )
    return job, functools.partial(instantiate, allowed=allowed)


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _config_of(folder: Path) -> DictConfig:
    """The configuration of a run that ended. Raises ConfigError if it is finished, and for
    overrides beside resume."""
    overrides = HydraConfig.get().overrides
    others = [o for o in overrides.task if not o.startswith(("resume=", "dry_run="))]
    others += [o for o in overrides.hydra if o.startswith("hydra.run")]
    if others:
        raise ConfigError(
            f"resume={folder} takes that run's own configuration: leave out {', '.join(others)}"
        )
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))["status"]
    if status == "done":
        raise ConfigError(f"resume={folder}: that run is finished")
    return OmegaConf.load(folder / ".hydra" / "config.yaml")  # type: ignore[return-value]


def to_container(cfg: DictConfig) -> dict[str, Any]:
    """The configuration resolved to plain Python. Raises ConfigError for a missing value, naming
    it, and for an interpolation that leads nowhere."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError("\n".join(f"{key} is required: set {key}=..." for key in missing))
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


class AlreadySaid(Exception):
    """Ends a job or a sweep that has said what is wrong; its argument is the exit code."""


def job(cfg: DictConfig) -> None:
    """One job of train.py: a single run in this process, a sweep's in one of its own, so that
    nothing that happens to it takes the others down."""
    path = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    if not _is_sweep():
        with claimed(path):
            attempt(cfg, path)
        return
    from rlhf_exp.training.folder import RunFolder

    if read_state(path).status == "done":  # a queue that preempts may start it once more
        return
    log_file = path / f"{HydraConfig.get().job.name}.log"
    # Plain, since the classes of launchers' settings cannot be pickled everywhere.
    plain = OmegaConf.to_container(HydraConfig.instance().cfg, resolve=True)  # type: ignore[arg-type]
    own = OmegaConf.to_container(cfg)
    code = call_in_process(_isolated, plain, own, path, log=log_file)
    unsaid = read_state(path).status in ("waiting", "running") and not is_claimed(path)
    if code and unsaid:
        RunFolder(path).write_status("failed", describe_end(code))
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise AlreadySaid(code)


def _isolated(hydra_config: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    from rlhf_exp.training.folder import RunFolder

    setup_globals()
    hydra_config["hydra"]["job_logging"]["root"]["handlers"] = ["file"]
    hydra_cfg = OmegaConf.create(hydra_config)
    HydraConfig.instance().cfg = hydra_cfg  # type: ignore[assignment]
    configure_log(hydra_cfg.hydra.job_logging, hydra_cfg.hydra.verbose)
    with claimed(path):
        RunFolder(path).write_status("running")
        attempt(OmegaConf.create(config), path)


def attempt(cfg: DictConfig, path: Path) -> None:
    """Runs a job and turns what goes wrong into a message, a status and an exit code."""
    from rlhf_exp.training.context import TrainingError
    from rlhf_exp.training.folder import RunFolder
    from rlhf_exp.training.progress import file_log

    file = file_log()
    try:
        execute(cfg, path)
    except ConfigError as error:
        log.error("error: %s", _bounded(str(error)))
        if _is_sweep():
            RunFolder(path).write_status("failed", str(error))
        else:  # nothing ran, so nothing but the log is left behind
            shutil.rmtree(path / str(HydraConfig.get().output_subdir), ignore_errors=True)
            (path / LOCK).unlink()
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        log.error("interrupted; what was logged so far is in %s", path)
        RunFolder(path).write_status("interrupted", "KeyboardInterrupt")
        raise SystemExit(130) from None
    except TrainingError as error:
        log.error("error: %s\nwhat was logged so far is in %s", error, path)
        file.exception("traceback")
        RunFolder(path).write_status("failed", str(error))
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        file.exception("traceback")
        RunFolder(path).write_status("failed", f"{type(error).__name__}: {error}")
        if _is_sweep():
            raise SystemExit(1) from None
        raise


def _bounded(message: str, limit: int = 9) -> str:
    lines = message.splitlines()
    if len(lines) <= limit:
        return message
    return "\n".join([*lines[: limit - 1], f"... and {len(lines) - limit + 1} more"])


def guard(main: Callable[[], None]) -> None:
    """Runs Hydra's main; its errors come as a few lines and exit code 2, jobs' as they left them.

    With HYDRA_FULL_ERROR=1 in the environment everything comes with its traceback.
    """
    if os.environ.get("HYDRA_FULL_ERROR"):
        main()
        return
    if "--dry-run" in sys.argv:
        sys.argv = [*(word for word in sys.argv if word != "--dry-run"), "dry_run=true"]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises in place of printing
    try:
        main()
    except AlreadySaid as failed:
        sys.exit(failed.args[0])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        shown = message if isinstance(error, BadJobs) else _bounded(message)
        print(f"error: {shown}", file=sys.stderr)
        sys.exit(2)


def explain(error: BaseException) -> str | None:
    """Hydra's complaint about a command line or a file, in a few lines with the fix; None for an
    error that is not Hydra's."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, ConfigError):
            return str(link)
        if isinstance(link, MissingConfigException) and link.options:
            return _missing_option(link)
    for link in chain:
        if isinstance(link, ConfigAttributeError | ConfigKeyError) and link.full_key:
            return f"{link.full_key}: no such key.{_suggestion(link.full_key)}"
        if isinstance(link, OmegaConfBaseException) and isinstance(link, TypeError):
            return f"{link.full_key}: {str(link).splitlines()[0]}"
    group = re.search(r"Could not override '([^']+)'", str(error))
    if isinstance(error, HydraException) and group:
        return f"{group[1]}: no such key or group.{_suggestion(group[1])}"
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return (
            f"cannot write {error.filename}: {error.strerror}; name other folders with"
            " hydra.run.dir=... and artifacts_dir=..."
        )
    if isinstance(error, ValueError) and "override must be a string or a list" in str(error):
        words = [w for w in _group_choices() if re.search("=(null|true|false|[-+.0-9]+)$", w)]
        return (
            f"{', '.join(words)}: a group takes an option's name; leave it out with ~, as ~reward"
        )
    if isinstance(error, HydraException | OmegaConfBaseException) or _is_from_hydra(error):
        return "\n".join(line for line in str(error).splitlines() if line.strip())
    return None


def _is_from_hydra(error: BaseException) -> bool:
    modules = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].startswith("hydra.")


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = sorted(error.options or ())
    close = difflib.get_close_matches(option, options, n=1)
    hint = f" Did you mean {group}={close[0]}?" if close else ""
    if group == "hydra/launcher" and option in LAUNCHERS:
        hint = f" It is there after: pip install 'rlhf_exp[{LAUNCHERS[option]}]'"
    return f"{group}={option}: no such option.{hint}\navailable: {', '.join(options)}"


def _suggestion(key: str) -> str:
    """ " Did you mean ...?" from the keys and groups that there are, or nothing."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            config = hydra.compose("config", overrides=_group_choices())
        except (HydraException, OmegaConfBaseException):  # the choices are what is wrong
            config = hydra.compose("config")
        known = list(_paths(OmegaConf.to_container(config)))
    known += [group.name for group in CONF.iterdir() if group.is_dir()]
    by_last = {path.rpartition(".")[2]: path for path in reversed(known)}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    close = close or [
        by_last[name]
        for name in difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1, cutoff=0.7)
    ]
    return f" Did you mean {close[0]}?" if close else " See: python train.py --cfg job"


def _group_choices() -> list[str]:
    groups = {group.name for group in CONF.iterdir() if group.is_dir()}
    return [word for word in sys.argv[1:] if word.partition("=")[0] in groups and "," not in word]


def _paths(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")

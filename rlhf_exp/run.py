"""The composition root: from a composed configuration to running stages.

The only file of the package that knows Hydra and OmegaConf. All settings are built and checked
first, which takes milliseconds; weights are loaded after that. What imports torch is imported
inside functions, so that `--help` and `--cfg` answer at once.
"""

import difflib
import errno
import functools
import hashlib
import inspect
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
from typing import Any

import hydra
import pydantic
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from rlhf_exp.settings import (
    PARTS,
    ConfigError,
    FolderName,
    Index,
    Text,
    field_problem,
    settings,
)

log = logging.getLogger(__name__)

ALLOWED_TARGETS = ("rlhf_exp.", "torch.optim.")
GROUPS = {"stage", *PARTS, "logger", "hub"}
UNWRITABLE = {errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR}
CONF = Path(__file__).resolve().parents[1] / "conf"


@settings
class RunSettings:
    """The keys of a configuration that are not groups; conf/config.yaml says what they mean."""

    name: FolderName
    seed: Index
    prepare_seed: Index
    device: Text
    artifacts_dir: Text
    allow_targets: tuple[Text, ...]
    prepare: dict[str, dict[str, Any]]
    until: Text | None
    resume: Text | None


def _run_dir(resume: str | None, otherwise: str) -> str:
    """The folder of a run: that of the run that is resumed, or a new one. Raises ConfigError if
    there is no such run."""
    if not resume:
        return otherwise
    if not all((Path(resume) / name).is_file() for name in (".hydra/config.yaml", "status.json")):
        raise ConfigError(f"resume={resume}: no run's folder, which has .hydra/ and status.json")
    return resume


def _slug(text: str, limit: int = 80) -> str:
    """A folder name from overrides: no slashes, and a hash in place of what is too long."""
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", str(text)).strip("-") or "default"
    if len(name) <= limit:
        return name
    return f"{name[: limit - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("slug", _slug, replace=True)
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
    for target in _targets(config):
        module = _forbidden_module(target, tuple(allowed))
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


def _forbidden_module(target: str, allowed: tuple[str, ...]) -> str | None:
    """The module that a target belongs to if it is not an allowed one. Names of an allowed module
    may lead out of it again, to what it imports: rlhf_exp.run.shutil.rmtree."""
    if not target.startswith(allowed):
        return target.rpartition(".")[0] or target
    if not target.startswith(ALLOWED_TARGETS):
        return None  # the user trusts it
    try:
        module = inspect.getmodule(hydra.utils.get_object(target))
    except (ImportError, ValueError):
        return None  # there is none of that name, as who instantiates it will say
    if module is None or f"{module.__name__}.".startswith(allowed):
        return None
    return module.__name__


def _targets(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield str(config["_target_"])
        for value in config.values():
            yield from _targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from _targets(value)


def execute(cfg: DictConfig, path: Path) -> None:
    """Checks the whole configuration, builds what the run stands on, and runs its stage."""
    from rlhf_exp.experiment import Job, run_experiment
    from rlhf_exp.training.context import pick_device
    from rlhf_exp.training.processor import use_processor_well

    use_processor_well()
    resumed = cfg.get("resume")
    config = to_container(_config_of(Path(str(resumed))) if resumed else cfg)
    own = read_own_keys(config)
    allowed = (*ALLOWED_TARGETS, *(f"{module}." for module in own.allow_targets))
    job = Job(
        path=path,
        sweep=HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN,
        resume=bool(resumed),
        device=pick_device(own.device),
        seed=own.seed,
        prepare_seed=own.prepare_seed,
        artifacts_dir=Path(own.artifacts_dir),
        until=own.until,
        chosen=_chosen(),
    )
    run_experiment(config, job, functools.partial(instantiate, allowed=allowed))


def _chosen() -> frozenset[str]:
    """The groups that the command line sets, wholly or by a key."""
    if not HydraConfig.initialized():
        return frozenset()
    words = HydraConfig.get().overrides.task
    return frozenset(re.split(r"[.=@]", word.lstrip("+"))[0] for word in words)


def _config_of(folder: Path) -> DictConfig:
    """The configuration of a run that ended. Raises ConfigError if it is finished, and for
    overrides beside resume."""
    overrides = HydraConfig.get().overrides
    others = [o for o in overrides.task if not o.startswith("resume=")]
    others += [o for o in overrides.hydra if o.startswith("hydra.run")]
    if others:
        raise ConfigError(
            f"resume={folder} takes that run's own configuration: leave out {', '.join(others)}"
        )
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError("resume is for a single run: leave out -m")
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))["status"]
    if status == "done":
        raise ConfigError(f"resume={folder}: that run is finished")
    return OmegaConf.load(folder / ".hydra" / "config.yaml")  # type: ignore[return-value]


def read_own_keys(config: Mapping[str, Any]) -> RunSettings:
    """The configuration's keys that are not groups. Raises ConfigError with everything that is
    wrong with them, keys that there are not included."""
    try:
        return RunSettings(**{key: config[key] for key in config.keys() - GROUPS})
    except pydantic.ValidationError as error:
        problems = sorted(field_problem("", detail) for detail in error.errors())
        raise ConfigError("\n".join(problems)) from error


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
    """Ends a job of a sweep that has said what is wrong, so that the other jobs run; its argument
    is the exit code."""


def job(cfg: DictConfig) -> None:
    """One job of train.py: runs it and turns what goes wrong into a message, a status and an exit
    code."""
    from rlhf_exp.training.context import TrainingError
    from rlhf_exp.training.folder import RunFolder
    from rlhf_exp.training.progress import file_log

    path = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    single = HydraConfig.get().mode == RunMode.RUN
    file = file_log()
    try:
        execute(cfg, path)
    except ConfigError as error:
        log.error("error: %s", _bounded(str(error)))
        if not single:
            RunFolder(path).write_status("failed", str(error))
            raise AlreadySaid(2) from error
        # Nothing ran, so nothing but the log is left behind.
        shutil.rmtree(path / str(HydraConfig.get().output_subdir), ignore_errors=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        log.error("interrupted; what was logged so far is in %s", path)
        RunFolder(path).write_status("interrupted", "KeyboardInterrupt")
        raise SystemExit(130) from None
    except TrainingError as error:
        log.error("error: %s\nwhat was logged so far is in %s", error, path)
        file.exception("traceback")
        RunFolder(path).write_status("failed", str(error))
        if not single:
            raise AlreadySaid(error.exit_code) from error
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        file.exception("traceback")
        RunFolder(path).write_status("failed", f"{type(error).__name__}: {error}")
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
        print(f"error: {_bounded(message)}", file=sys.stderr)
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
    group = re.search(r"Could not override '([^']+)'", str(error))
    if isinstance(error, HydraException) and group:
        return f"{group[1]}: no such key or group.{_suggestion(group[1])}"
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return (
            f"cannot write {error.filename}: {error.strerror}; name other folders with"
            " hydra.run.dir=... and artifacts_dir=..."
        )
    if isinstance(error, ValueError) and "override must be a string or a list" in str(error):
        return "a group takes one of its options, not null; leave it out with ~, as in ~experiment"
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

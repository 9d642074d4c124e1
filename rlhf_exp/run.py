"""The composition root: from a composed configuration to running stages.

The only file of the package that knows Hydra and OmegaConf. All settings are built and checked
first, which takes milliseconds; weights are loaded after that. What imports torch is imported
inside functions, so that `--help` and `--cfg` answer at once.
"""

import difflib
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import pydantic
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from rlhf_exp.settings import ConfigError

if TYPE_CHECKING:
    import torch

    from rlhf_exp.training.loggers import Logger

log = logging.getLogger(__name__)

ALLOWED_TARGETS = ("rlhf_exp.", "torch.optim.")
KEYS = {
    "stage", "task", "model", "reward", "sampler", "optimizer", "schedule", "logger",
    "prepare", "name", "seed", "prepare_seed", "device", "artifacts_dir", "allow_targets",
}  # fmt: skip
CONF = Path(__file__).resolve().parents[1] / "conf"


def _slug(text: str, limit: int = 80) -> str:
    """A folder name from overrides: no slashes, and a hash in place of what is too long."""
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", str(text)).strip("-") or "default"
    if len(name) <= limit:
        return name
    return f"{name[: limit - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("slug", _slug, replace=True)
OmegaConf.register_new_resolver(
    "run_id", lambda: secrets.token_hex(3), use_cache=True, replace=True
)


def instantiate(
    config: Mapping[str, Any], path: str, problems: list[str], *, allowed: Sequence[str]
) -> Any:
    """The object that a group's configuration describes, or None with its problems appended."""
    for target in _targets(config):
        if not target.startswith(tuple(allowed)):
            problems.append(
                f"{path}._target_={target} is outside of {', '.join(allowed)}; if you trust that"
                f" module, add it: allow_targets=[{target.rsplit('.', 1)[0]}]"
            )
            return None
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, pydantic.ValidationError):
            problems += [_field_problem(path, detail) for detail in cause.errors()]
        elif isinstance(cause, ConfigError):
            problems.append(f"{path}: {cause}")
        else:
            problems.append(f"{path}: {str(error).splitlines()[0]}")
        return None


def _field_problem(path: str, detail: Any) -> str:
    where = ".".join((path, *map(str, detail["loc"])))
    if detail["type"] == "missing":
        return f"{where}: is required"
    if detail["type"] == "unexpected_keyword_argument":
        return f"{where}: no such key of {path}"
    if isinstance(detail.get("ctx", {}).get("error"), ConfigError):
        return str(detail["ctx"]["error"])  # which names its field itself
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return f"{path}: {message}"
    return f"{where}={detail['input']!r}: {message}"


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
    from rlhf_exp.steps import prepare, read_steps
    from rlhf_exp.training.context import pick_device

    config = to_container(cfg)
    unknown = sorted(set(config) - KEYS)
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: no such key; known: {', '.join(sorted(KEYS))}")
    allowed = (*ALLOWED_TARGETS, *(f"{module}." for module in config["allow_targets"]))
    build = functools.partial(instantiate, allowed=allowed)
    device = pick_device(config["device"])
    steps = read_steps(config)
    problems: list[str] = []
    for step in steps:
        try:
            step.build(build)
        except ConfigError as error:
            problems.append(str(error))
    logger = build(config["logger"], "logger", problems)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    _quieten_transformers()
    models = prepare(
        steps[:-1],
        build,
        root=Path(config["artifacts_dir"]),
        seed=config["prepare_seed"],
        device=device,
    )
    stage, parts = steps[-1].resolved(models).build(build)
    _run_stage(stage, parts, config, logger, device, path)


def _quieten_transformers() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _run_stage(
    stage: Any,
    parts: Mapping[str, Any],
    config: Mapping[str, Any],
    logger: "Logger",
    device: "torch.device",
    path: Path,
) -> None:
    from rlhf_exp.training.context import Context
    from rlhf_exp.training.folder import RunFolder
    from rlhf_exp.training.loggers import RunInfo
    from rlhf_exp.training.timing import since_process_start

    hydra_config = HydraConfig.get()
    sweep = hydra_config.mode == RunMode.MULTIRUN
    info = RunInfo(
        name=path.name,
        group=path.parent.name if sweep else None,
        job_type=str(hydra_config.runtime.choices["stage"]),
        config=config,
        shared_folder=path.parent if sweep else path,
    )
    with RunFolder(path, lambda: logger.open(info)) as folder:
        result = stage.run(Context(folder=folder, seed=config["seed"], device=device), **parts)
        if not sweep:
            result["seconds"]["total"] = since_process_start()
        folder.write_json("result.json", result)
        folder.write_status("done")
    log.info("seconds: %s", "  ".join(f"{k} {v:.1f}" for k, v in result["seconds"].items()))
    log.info("run folder: %s", path)


def to_container(cfg: DictConfig) -> dict[str, Any]:
    """The configuration resolved to plain Python. Raises ConfigError for a missing value, naming
    it, and for an interpolation that leads nowhere."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        keys = "\n".join(f"{key} is required: set {key}=..." for key in missing[:8])
        raise ConfigError(keys)
    try:
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def job(cfg: DictConfig) -> None:
    """One job of train.py: runs it and turns what goes wrong into a message, a status and an exit
    code."""
    from rlhf_exp.training.context import TrainingError
    from rlhf_exp.training.folder import RunFolder

    path = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    single = HydraConfig.get().mode == RunMode.RUN
    file_log = _file_log()
    try:
        execute(cfg, path)
    except ConfigError as error:
        log.error("error: %s", _bounded(str(error)))
        if not single:
            RunFolder(path).write_status("failed", str(error))
            raise
        # Nothing ran, so nothing but the log is left behind.
        shutil.rmtree(path / ".hydra", ignore_errors=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        log.error("interrupted; what was logged so far is in %s", path)
        RunFolder(path).write_status("interrupted", "KeyboardInterrupt")
        raise SystemExit(130) from None
    except TrainingError as error:
        log.error("error: %s\nwhat was logged so far is in %s", error, path)
        file_log.exception("traceback")
        RunFolder(path).write_status("failed", str(error))
        if not single:
            raise
        raise SystemExit(1) from None
    except Exception as error:
        file_log.exception("traceback")
        RunFolder(path).write_status("failed", f"{type(error).__name__}: {error}")
        raise


def _file_log() -> logging.Logger:
    """A logger that writes to train.log alone. The progress lines go there too while a bar is on
    the terminal."""
    from rlhf_exp.training.progress import line_log, on_terminal

    handlers: list[logging.Handler] = [
        h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)
    ]
    file_log = logging.getLogger("rlhf_exp.file")
    for logger in (file_log, line_log) if on_terminal() else (file_log,):
        logger.handlers, logger.propagate = handlers, False
    return file_log


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
    except ConfigError:
        sys.exit(2)  # a job of a sweep, which said it already
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
        if isinstance(link, MissingConfigException) and link.options:
            return _missing_option(link)
    for link in chain:
        if isinstance(link, ConfigAttributeError | ConfigKeyError) and link.full_key:
            return f"{link.full_key}: no such key.{_suggestion(link.full_key)}"
    group = re.search(r"Could not override '([^']+)'", str(error))
    if isinstance(error, HydraException) and group:
        return f"{group[1]}: no such key or group.{_suggestion(group[1])}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return "\n".join(line for line in str(error).splitlines() if line.strip())
    return None


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
        known = list(_paths(OmegaConf.to_container(hydra.compose("config"))))
    known += [group.name for group in CONF.iterdir() if group.is_dir()]
    by_last = {path.rpartition(".")[2]: path for path in reversed(known)}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    close = close or [
        by_last[name]
        for name in difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1, cutoff=0.7)
    ]
    return f" Did you mean {close[0]}?" if close else " See: python train.py --cfg job"


def _paths(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")

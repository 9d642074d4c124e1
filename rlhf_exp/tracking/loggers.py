"""What every logger is, and two of them: W&B beside the local files, and the local files alone.

W&B never stops a run: without a key or a network, or if the server refuses, it writes offline, and
where it cannot write or breaks it is dropped with one warning while metrics.jsonl goes on.
"""

import importlib.util
import logging
import os
import secrets
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import AfterValidator, ValidationError

from rlhf_exp.machine.network import reachable
from rlhf_exp.runs.folder import Sink
from rlhf_exp.security.redaction import redact_words
from rlhf_exp.settings import ConfigError, Positive, Text, field_problem, settings
from rlhf_exp.tracking.wandb_run import WandbRun, drop_service
from rlhf_exp.tracking.wandb_sink import WandbSink

log = logging.getLogger(__name__)

INIT_S = 20  # how long the start of a run may take online
WANDB_URLS = ("https://api.forge.coreweave.com", "https://api.wandb.ai")  # since wandb 0.31, before

MAX_NAME, MAX_TAG = 128, 64  # characters that W&B takes; it says so when it uploads

_Variables = Mapping[str, str | None]


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a logger needs to know of a run. `shared_folder` is one for all runs of a sweep;
    `run_id` is the same when the run is resumed."""

    name: str
    group: str | None
    job_type: str
    config: Mapping[str, Any]
    shared_folder: Path
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))


@runtime_checkable
class Logger(Protocol):
    """A logger group's settings."""

    def problems(self, *, name: str, group: str | None) -> list[str]:
        """Why a run of that name could not be logged, known before it is begun."""
        ...

    def open(self, info: RunInfo) -> Any:
        """A context manager that yields the sinks beside the local files."""
        ...


def missing_package(package: str) -> list[str]:
    """A line that says how to install a logger's package, if it is not installed. The extra of
    this package that brings it has its name."""
    if importlib.util.find_spec(package) is not None:
        return []
    return [f"logger: {package} is not installed: pip install 'rlhf_exp[{package}]'"]


def _check_name(name: str) -> str:
    if len(name) > MAX_NAME:
        raise ValueError(f"this name has {len(name)} characters; W&B takes {MAX_NAME}")
    if refused := sorted(set(name) & set("/\\#?%:")):
        raise ValueError(f"W&B takes no {' '.join(refused)} in this name")
    return name


def _check_tags(tags: tuple[str, ...]) -> tuple[str, ...]:
    for tag in tags:
        if not 1 <= len(tag) <= MAX_TAG:
            raise ValueError(f"W&B takes tags of 1 to {MAX_TAG} characters, which {tag!r} is not")
        if tags.count(tag) > 1:
            raise ValueError(f"W&B takes a tag once, and {tag!r} is there more often")
    return tags


Name = Annotated[Text, AfterValidator(_check_name)]
Tags = Annotated[tuple[str, ...], AfterValidator(_check_tags)]


@settings
class LocalLogger:
    """The run's folder and nothing else."""

    def problems(self, *, name: str, group: str | None) -> list[str]:
        """None."""
        return []

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[list[Sink]]:
        """No further sinks."""
        yield []


@settings
class WandbLogger:
    """W&B. mode=auto obeys WANDB_MODE if it is set; else it is online with a key and a network,
    and offline without. `finish_s` bounds how long the end of a run waits for W&B."""

    project: Name = "rlhf_exp"
    r"""W&B project: at most 128 characters, none of / \ # ? % :."""
    entity: Name | None = None
    """W&B user or team; null: your default."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Auto (online with a key and a server that takes it, else offline), online, offline,
    disabled."""
    tags: Tags = ()
    """Words to find the run by: of 1 to 64 characters, each once."""
    notes: str | None = None
    """a text shown beside the run; null: none."""
    log_model: bool = False
    """true: the final model/ of a run that is done becomes an artifact of type model."""
    finish_s: Positive = 60.0
    """Seconds that the end of a run waits for W&B, uploads included; then: wandb sync."""

    def problems(self, *, name: str, group: str | None) -> list[str]:
        """A line for each name that is too long for W&B."""
        if self._wanted_mode() == "disabled":
            return []
        named = {"the run's folder": name, "the sweep's folder": group or ""}
        return [
            f"the name of {what} has {len(text)} characters, and W&B takes {MAX_NAME}: choose a"
            " shorter one, or logger=local"
            for what, text in named.items()
            if len(text) > MAX_NAME
        ]

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[list[Sink]]:
        """The sink to a W&B run, as `connect` makes it, or none."""
        with self.connect(info) as run:
            yield [] if run is None else [WandbSink(run, log_model=self.log_model)]

    @contextmanager
    def connect(self, info: RunInfo) -> Iterator[WandbRun | None]:
        """A W&B run, marked failed if the block raises; None if mode is disabled or W&B cannot
        start. Raises ConfigError if online is asked for and the server refuses."""
        mode = self._resolve_mode()
        if mode == "disabled":
            yield None
            return
        surroundings = _surroundings(info.shared_folder / "wandb")
        with _environment({k: v for k, v in surroundings.items() if not os.environ.get(k)}):
            run = self._start(info, mode)
            if run is None:
                yield None
                return
            told = WandbRun(run, finish_s=self.finish_s)
            try:
                yield told
            except BaseException:
                told.close(exit_code=1)
                raise
            told.close(exit_code=0)

    def _start(self, info: RunInfo, mode: Literal["online", "offline"]) -> Any:
        """A run of W&B; None, with a warning, if none can be started."""
        folder = info.shared_folder / "wandb"
        try:
            _try_to_write(folder)
        except OSError as error:
            log.warning("W&B cannot start (%s); going on without it", error)
            return None
        bare = {name: None for name in os.environ if name.startswith("WANDB_")}
        attempts: list[tuple[Literal["online", "offline"], _Variables, str]] = [
            ("offline", {}, "trying again without the WANDB_* variables"),
            ("offline", {**bare, **_surroundings(folder)}, "going on without it"),
        ]
        if mode == "online":
            attempts.insert(0, ("online", {}, "logging offline"))
        for attempt, variables, consequence in attempts:
            try:
                return self._init(info, attempt, variables)
            except Exception as error:  # a server, a variable, a disk: nothing that training needs
                drop_service()  # it still holds the run that failed, and refuses its id
                reason = _reason(error)
                if attempt == "online" == self._wanted_mode():
                    raise ConfigError(
                        f"logger.mode=online: W&B cannot start online ({reason}); fix that"
                        " (`wandb login` sets the key), or set logger.mode=offline"
                    ) from error
                log.warning("W&B cannot start %s (%s); %s", attempt, reason, consequence)
        return None

    def _init(
        self, info: RunInfo, mode: Literal["online", "offline"], variables: _Variables
    ) -> Any:
        import wandb

        # Under an agent of W&B the id is taken from the variable alone.
        own = {"WANDB_MODE": mode, "WANDB_RUN_ID": info.run_id}
        with _environment({**variables, **own}), _command_line(redact_words(sys.argv)):
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                id=info.run_id,
                resume="allow",
                mode=mode,
                dir=info.shared_folder,
                name=info.name,
                group=info.group,
                job_type=info.job_type,
                tags=self.tags,
                notes=self.notes,
                config={"run": info.name, **info.config},  # to tell joined tables apart
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_S),
            )
        run.define_metric("phase")
        run.define_metric("*", step_metric="phase")
        if mode == "offline":
            files = shlex.quote(str(Path(run.dir).parent))
            log.info("W&B: offline, in %s; upload later with: wandb sync %s",
                     info.shared_folder / "wandb", files)  # fmt: skip
        return run

    def _wanted_mode(self) -> str:
        return os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode

    def _resolve_mode(self) -> Literal["online", "offline", "disabled"]:
        asked = self._wanted_mode()
        if asked in ("online", "offline", "disabled"):
            return asked  # type: ignore[return-value]
        url = os.environ.get("WANDB_BASE_URL")
        urls = (url,) if url else WANDB_URLS
        if not _has_key(urls):
            return "offline"
        if any(reachable(url) for url in urls):
            return "online"
        log.warning("W&B: %s is out of reach, logging offline", urls[0])
        return "offline"


def _surroundings(folder: Path) -> dict[str, str]:
    """What W&B reads from the environment alone: where to put what would go into the home directory
    (payloads that `wandb sync` needs later, caches), and that it says nothing itself."""
    data = str(folder.absolute() / "data")
    return {
        "WANDB_DATA_DIR": data,
        "WANDB_CACHE_DIR": str(folder.absolute() / "cache"),
        "WANDB_SILENT": "true",
        # W&B does not start without a home, which a user without a passwd entry lacks.
        **({"HOME": data} if os.path.expanduser("~") == "~" else {}),
    }


@contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Within it the environment has these variables, and lacks those that are None."""
    # W&B looks its server up before it reads its settings, but not before it reads WANDB_MODE.
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    # W&B keeps sys.argv with a run, and takes it from nowhere else.
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def _has_key(urls: Sequence[str]) -> bool:
    # Asking wandb itself costs 12 s without a network; these are the two places it looks in.
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.path.expanduser(os.environ.get("NETRC", "~/.netrc")))
    try:
        words = netrc.read_text(encoding="utf-8", errors="replace").split()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        log.warning("W&B: no key can be read (%s)", error)
        return False
    return any(url.partition("://")[2].partition("/")[0] in words for url in urls)


def _reason(error: Exception) -> str:
    """What W&B says is wrong, on a short line."""
    if isinstance(error, ValidationError):
        return "; ".join(field_problem("", detail) for detail in error.errors())
    reason = str(error).partition("\n")[0] or type(error).__name__
    if "deadline exceeded" in reason or "timed out" in reason.lower():
        return f"no usable answer within {INIT_S} s"
    if "invalid character" in reason:
        return "the server's answer is not W&B's; a login page of the network?"
    return reason[:200]


def _try_to_write(folder: Path) -> None:
    # Where it cannot, W&B turns to the system's temporary folder without a word. Names alone may
    # find room where contents do not.
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b" " * 65536)

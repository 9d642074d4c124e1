"""The logger of W&B: its settings, and how a run of it is started online or offline.

W&B never stops a run. Without a key or a network, or if the server refuses, W&B logs offline. If it
cannot write, or fails later, it is dropped with one warning, and metrics.jsonl goes on.
"""

import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError

from rlhf_exp.machine.network import reachable
from rlhf_exp.runs.folder import Sink
from rlhf_exp.security.redaction import redact_words
from rlhf_exp.settings import ConfigError, Positive, Text, field_problem, settings
from rlhf_exp.tracking.protocol import RunInfo
from rlhf_exp.tracking.wandb_sink import WandbSink
from rlhf_exp.tracking.wandb_thread import WandbRun, drop_service

log = logging.getLogger(__name__)

INIT_S = 20  # seconds that W&B may take to start a run online
WANDB_URLS = ("https://api.forge.coreweave.com", "https://api.wandb.ai")  # since wandb 0.31, before

MAX_NAME, MAX_TAG = 128, 64  # characters; W&B itself reports longer ones only when it uploads

_Variables = Mapping[str, str | None]


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
            raise ValueError(f"W&B takes each tag once, and {tag!r} is repeated")
    return tags


Name = Annotated[Text, AfterValidator(_check_name)]
Tags = Annotated[tuple[str, ...], AfterValidator(_check_tags)]


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
        if self._mode_setting() == "disabled":
            return []
        names = {"the run's folder": name, "the sweep's folder": group or ""}
        return [
            f"the name of {what} has {len(text)} characters, and W&B takes {MAX_NAME}: choose a"
            " shorter one, or logger=local"
            for what, text in names.items()
            if len(text) > MAX_NAME
        ]

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[list[Sink]]:
        """The sink that logs to the W&B run of `connect`, or none."""
        with self.connect(info) as run:
            yield [] if run is None else [WandbSink(run, log_model=self.log_model)]

    @contextmanager
    def connect(self, info: RunInfo) -> Iterator[WandbRun | None]:
        """A W&B run, marked failed if the block raises; None if mode is disabled or W&B cannot
        start. Raises ConfigError if mode is online and the server refuses."""
        mode = self._resolve_mode()
        if mode == "disabled":
            yield None
            return
        defaults = _default_variables(info.shared_folder / "wandb")
        with _environment({k: v for k, v in defaults.items() if not os.environ.get(k)}):
            run = self._start(info, mode)
            if run is None:
                yield None
                return
            wandb_run = WandbRun(run, finish_s=self.finish_s)
            try:
                yield wandb_run
            except BaseException:
                wandb_run.close(exit_code=1)
                raise
            wandb_run.close(exit_code=0)

    def _start(self, info: RunInfo, mode: Literal["online", "offline"]) -> Any:
        """A W&B run; None, with a warning, if W&B cannot start."""
        folder = info.shared_folder / "wandb"
        try:
            _try_to_write(folder)
        except OSError as error:
            log.warning("W&B cannot start (%s); going on without it", error)
            return None
        unset = {name: None for name in os.environ if name.startswith("WANDB_")}
        attempts: list[tuple[Literal["online", "offline"], _Variables, str]] = [
            ("offline", {}, "trying again without the WANDB_* variables"),
            ("offline", {**unset, **_default_variables(folder)}, "going on without it"),
        ]
        if mode == "online":
            attempts.insert(0, ("online", {}, "logging offline"))
        for attempt, variables, consequence in attempts:
            try:
                return self._init(info, attempt, variables)
            except (
                Exception
            ) as error:  # the server, a variable, the disk: training needs none of them
                drop_service()  # it still holds the failed run, and refuses its id
                reason = _reason(error)
                if attempt == "online" == self._mode_setting():
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

        # Under a W&B agent, W&B reads the id from the variable alone.
        own = {"WANDB_MODE": mode, "WANDB_RUN_ID": info.run_id}
        with _environment({**variables, **own}), _replace_argv(redact_words(sys.argv)):
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
                config={"run": info.name, **info.config},  # tells joined tables apart
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

    def _mode_setting(self) -> str:
        return os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode

    def _resolve_mode(self) -> Literal["online", "offline", "disabled"]:
        mode = self._mode_setting()
        if mode in ("online", "offline", "disabled"):
            return mode  # type: ignore[return-value]
        url = os.environ.get("WANDB_BASE_URL")
        urls = (url,) if url else WANDB_URLS
        if not _has_key(urls):
            return "offline"
        if any(reachable(url) for url in urls):
            return "online"
        log.warning("W&B: %s is out of reach, logging offline", urls[0])
        return "offline"


def _default_variables(folder: Path) -> dict[str, str]:
    """Settings that W&B reads from the environment alone: where to put files that would go into the
    home directory (payloads that `wandb sync` needs later, caches), and to print nothing."""
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
    """Sets these variables of the environment in the block, and removes those that are None."""
    # W&B reads WANDB_MODE before it looks its server up, and its settings only after that.
    previous_values = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(previous_values)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _replace_argv(argv: list[str]) -> Iterator[None]:
    # W&B records sys.argv, and no setting overrides it.
    original_argv, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = original_argv


def _has_key(urls: Sequence[str]) -> bool:
    # wandb itself takes 12 s to answer without a network; it looks in these two places.
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
    """W&B's error message, on a short line."""
    if isinstance(error, ValidationError):
        return "; ".join(field_problem("", detail) for detail in error.errors())
    reason = str(error).partition("\n")[0] or type(error).__name__
    if "deadline exceeded" in reason or "timed out" in reason.lower():
        return f"no usable answer within {INIT_S} s"
    if "invalid character" in reason:
        return "the server's answer is not W&B's; a login page of the network?"
    return reason[:200]


def _try_to_write(folder: Path) -> None:
    # W&B silently uses the system's temporary folder if it cannot write here. An empty file may be
    # created on a full disk, so the test writes some bytes.
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b" " * 65536)

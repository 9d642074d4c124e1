"""Logger groups: W&B beside the local files, or the local files alone.

W&B never stops a run: without a key or a network it writes offline, and where it cannot write or
breaks it is dropped with one warning while metrics.jsonl goes on.
"""

import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

from rlhf_exp.network import reachable
from rlhf_exp.redaction import redact_words
from rlhf_exp.settings import ConfigError, Positive, Text, settings
from rlhf_exp.training.folder import Sink
from rlhf_exp.training.wandb_run import WandbRun, drop_service
from rlhf_exp.training.wandb_sink import WandbSink

log = logging.getLogger(__name__)

WANDB_URLS = ("https://api.forge.coreweave.com", "https://api.wandb.ai")  # since wandb 0.31, before


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a logger needs to know of a run. `shared_folder` is one for all runs of a sweep;
    `run_id` is the same when the run is resumed."""

    name: str
    group: str | None
    job_type: str
    config: Mapping[str, Any]
    shared_folder: Path
    run_id: str | None = None


@runtime_checkable
class Logger(Protocol):
    """A logger group's settings."""

    def open(self, info: RunInfo) -> Any:
        """A context manager that yields the sinks beside the local files."""
        ...


@settings
class LocalLogger:
    """The run's folder and nothing else."""

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[list[Sink]]:
        """No further sinks."""
        yield []


@settings
class WandbLogger:
    """W&B. mode=auto obeys WANDB_MODE if it is set; else it is online with a key and a network,
    and offline without. `finish_s` bounds how long the end of a run waits for W&B."""

    project: Text = "rlhf_exp"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    tags: tuple[str, ...] = ()
    notes: str | None = None
    log_model: bool = False
    finish_s: Positive = 60.0

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
        with ExitStack() as stack:
            for name, value in _surroundings(info.shared_folder / "wandb").items():
                if not os.environ.get(name):
                    stack.enter_context(_environment(name, value))
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
        try:
            _try_to_write(info.shared_folder / "wandb")
            return self._start_on_or_offline(info, mode)
        except ConfigError:
            raise
        except Exception as error:  # a disk, a port, its binary: nothing that training needs
            reason = str(error).partition("\n")[0] or type(error).__name__
            log.warning("W&B cannot start (%s); going on without it", reason)
            drop_service()
            return None

    def _start_on_or_offline(self, info: RunInfo, mode: Literal["online", "offline"]) -> Any:
        if mode == "offline":
            return self._init(info, mode)
        import wandb

        try:
            return self._init(info, mode)
        except wandb.Error as error:
            reason = str(error).partition("\n")[0]
            if self.mode != "auto" or os.environ.get("WANDB_MODE") == "online":
                raise ConfigError(
                    f"logger.mode=online: W&B refuses ({reason}); run `wandb login`, or set"
                    " logger.mode=offline"
                ) from error
            log.warning("W&B: the server refuses (%s), logging offline", reason)
            return self._init(info, "offline")

    def _init(self, info: RunInfo, mode: Literal["online", "offline"]) -> Any:
        import wandb

        with _environment("WANDB_MODE", mode), _command_line(redact_words(sys.argv)):
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                id=info.run_id,
                resume="allow" if info.run_id else None,
                mode=mode,
                dir=info.shared_folder,
                name=info.name,
                group=info.group,
                job_type=info.job_type,
                tags=self.tags,
                notes=self.notes,
                config={"run": info.name, **info.config},  # to tell joined tables apart
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True, init_timeout=20),
            )
        run.define_metric("phase")
        run.define_metric("*", step_metric="phase")
        if mode == "offline":
            files = shlex.quote(str(Path(run.dir).parent))
            log.info("W&B: offline, in %s; upload later with: wandb sync %s",
                     info.shared_folder / "wandb", files)  # fmt: skip
        return run

    def _resolve_mode(self) -> Literal["online", "offline", "disabled"]:
        asked = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
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
    return {
        "WANDB_DATA_DIR": str(folder.absolute() / "data"),
        "WANDB_CACHE_DIR": str(folder.absolute() / "cache"),
        "WANDB_SILENT": "true",
    }


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    # W&B looks its server up before it reads its settings, but not before it reads this.
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


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
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not netrc.is_file():
        return False
    words = netrc.read_text(encoding="utf-8", errors="replace").split()
    return any(urlsplit(url).netloc in words for url in urls)


def _try_to_write(folder: Path) -> None:
    # Where it cannot, W&B turns to the system's temporary folder without a word. Names alone may
    # find room where contents do not.
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b" " * 65536)

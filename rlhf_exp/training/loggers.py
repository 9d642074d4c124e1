"""Logger groups: W&B beside the local files, or the local files alone.

W&B never stops a run: without a key or a network it writes offline, and when it breaks it is
dropped with one warning while metrics.jsonl goes on.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

from rlhf_exp.network import reachable
from rlhf_exp.settings import ConfigError, Text, settings
from rlhf_exp.training.folder import Sink

log = logging.getLogger(__name__)

WANDB_URLS = ("https://api.forge.coreweave.com", "https://api.wandb.ai")  # since wandb 0.31, before
TABLE_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a logger needs to know of a run. `shared_folder` is one for all runs of a sweep."""

    name: str
    group: str | None
    job_type: str
    config: Mapping[str, Any]
    shared_folder: Path


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
    and offline without."""

    project: Text = "rlhf_exp"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    tags: tuple[str, ...] = ()

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[list[Sink]]:
        """A W&B run, marked failed if the block raises; nothing if mode is disabled. Raises
        ConfigError if online is asked for and the server refuses."""
        mode = self._resolve_mode()
        if mode == "disabled":
            yield []
            return
        run = self._start(info, mode)
        try:
            yield [_WandbSink(run)]
        except BaseException:
            _finish(run, exit_code=1)
            raise
        _finish(run, exit_code=0)

    def _start(self, info: RunInfo, mode: Literal["online", "offline"]) -> Any:
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

        info.shared_folder.mkdir(parents=True, exist_ok=True)
        with _environment("WANDB_MODE", mode):
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=mode,
                dir=info.shared_folder,
                name=info.name,
                group=info.group,
                job_type=info.job_type,
                tags=self.tags,
                config=dict(info.config),
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True, init_timeout=20),
            )
        run.define_metric("phase")
        run.define_metric("*", step_metric="phase")
        if mode == "offline":
            log.info("W&B: offline, in %s; upload later with: wandb sync %s",
                     info.shared_folder / "wandb", Path(run.dir).parent)  # fmt: skip
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


def _has_key(urls: Sequence[str]) -> bool:
    # Asking wandb itself costs 12 s without a network; these are the two places it looks in.
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not netrc.is_file():
        return False
    words = netrc.read_text(encoding="utf-8", errors="replace").split()
    return any(urlsplit(url).netloc in words for url in urls)


def _finish(run: Any, *, exit_code: int) -> None:
    # Not `with run`, which prints the traceback of what was raised and raises if W&B's own process
    # has died.
    try:
        run.finish(exit_code=exit_code)
    except Exception as error:
        log.warning("W&B could not finish its run (%s); metrics.jsonl has everything", error)


class _WandbSink:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, phase: int, metrics: Mapping[str, float]) -> None:
        self._send({"phase": phase, **metrics})

    def log_samples(self, phase: int, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        shown = rows[:TABLE_ROWS]
        columns = list(shown[0]) if shown else []
        table = wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in shown])
        self._send({"phase": phase, "samples": table})

    def _send(self, payload: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(payload)
        except Exception as error:
            log.warning("W&B failed (%s); going on without it, metrics.jsonl has everything", error)
            self._run = None

"""The protocol of loggers, and the logger that writes nothing besides the run's folder."""

import importlib.util
import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rlhf_exp.runs.folder import Sink
from rlhf_exp.settings import settings


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a logger needs to know about a run. All runs of a sweep have one `shared_folder`. A
    resumed run keeps its `run_id`."""

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
        """Reasons why a run of that name cannot be logged, found before the run starts."""
        ...

    def open(self, info: RunInfo) -> Any:
        """A context manager that yields the sinks beside the local files."""
        ...


def missing_package(package: str) -> list[str]:
    """A line that says how to install a logger's package, or none if it is installed. The extra of
    rlhf_exp that installs the package has the same name."""
    if importlib.util.find_spec(package) is not None:
        return []
    return [f"logger: {package} is not installed: pip install 'rlhf_exp[{package}]'"]


@settings
class LocalLogger:
    """The run's folder and nothing else."""

    def problems(self, *, name: str, group: str | None) -> list[str]:
        """None."""
        return []

    def open(self, info: RunInfo) -> AbstractContextManager[list[Sink]]:
        """Yields no sinks."""
        return nullcontext([])

"""A run's folder: metrics.jsonl, samples.jsonl, result.json, status.json, environment.txt.

Metrics are flushed line by line: they are the source of truth, whatever happens to other loggers.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

Status = Literal["running", "done", "failed", "interrupted"]


@runtime_checkable
class Sink(Protocol):
    """Another place that metrics and samples go to, such as W&B."""

    def log(self, phase: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a phase, or of an update in supervised stages."""
        ...

    def log_samples(self, phase: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of samples."""
        ...


OpenSinks = Callable[[], AbstractContextManager[list[Sink]]]


def local_only() -> AbstractContextManager[list[Sink]]:
    """No sinks but the folder's own files."""
    return nullcontext([])


class RunFolder:
    """Writes what a run leaves behind. Nothing is created before the first write."""

    def __init__(self, path: Path, open_sinks: OpenSinks = local_only) -> None:
        self.path = path
        self._open_sinks = open_sinks
        self._stack = ExitStack()
        self._sinks: list[Sink] = []

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def start(self) -> None:
        """Says that everything is loaded and the work begins; opens the other sinks."""
        self._sinks = self._stack.enter_context(self._open_sinks())
        self.write_status("running")
        self.write_environment()

    def log(self, phase: int, metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.jsonl, flushed, and passes it on. Non-finite numbers become
        null."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._append("metrics.jsonl", [{"phase": phase, **finite}])
        for sink in self._sinks:
            sink.log(phase, metrics)

    def log_samples(self, phase: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows to samples.jsonl with their phase, and passes them on."""
        self._append("samples.jsonl", [{"phase": phase, **row} for row in rows])
        for sink in self._sinks:
            sink.log_samples(phase, rows)

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, or of samples.jsonl, so far."""
        return [json.loads(line) for line in self._lines(name)]

    def rewind(self, phase: int) -> None:
        """Removes the rows of later phases, which a resumed run writes again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [line for line in self._lines(name) if json.loads(line)["phase"] <= phase]
            self._write(name, "".join(f"{line}\n" for line in kept))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file."""
        self._write(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_status(self, status: Status, error: str | None = None) -> None:
        """Writes status.json."""
        self._write("status.json", json.dumps({"status": status, "error": error}) + "\n")

    def write_environment(self) -> None:
        """Writes environment.txt: commit, platform and the versions of all packages."""
        self._write("environment.txt", "\n".join(environment()) + "\n")

    def _lines(self, name: str) -> list[str]:
        # Not splitlines(), which also splits at characters that JSON leaves in a text. What follows
        # the last end of a line was being written when the run died.
        return (self.path / name).read_text(encoding="utf-8").split("\n")[:-1]

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _write(self, name: str, text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path / name)


def environment() -> list[str]:
    """Commit (with "+" if files differ from it), platform, threads and package versions, a line
    each."""
    root = Path(__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "HEAD") or "unknown"
    dirty = "+" if _git(root, "status", "--porcelain", "--untracked-files=no") else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = sorted(
        {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    )
    return [
        f"commit {commit}{dirty}",
        f"python {platform.python_version()} on {platform.platform()}",
        f"cpu {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        f"gpu {gpu}",
        *packages,
    ]


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()

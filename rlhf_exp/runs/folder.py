"""A run's folder: metrics.jsonl, samples.jsonl, histograms.jsonl, result.json, status.json,
environment.txt.

Metrics are flushed line by line: they are the source of truth, even if other loggers fail.
"""

import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rlhf_exp.runs.files import parse_row, sync, write_whole
from rlhf_exp.runs.paths import (
    ENVIRONMENT,
    HISTOGRAMS,
    MADE_OF,
    METRICS,
    MODEL,
    RESOLVED_CONFIG,
    RESULT,
    RUN_ID,
    SAMPLES,
    SNAPSHOTS,
)
from rlhf_exp.runs.presentation import attempt
from rlhf_exp.runs.provenance import environment
from rlhf_exp.runs.status import write_status
from rlhf_exp.runs.summary import Histogram, summarize

log = logging.getLogger(__name__)
ROWS = (METRICS, SAMPLES, HISTOGRAMS)
TABLE_ROWS = 32  # samples of each evaluation that trackers show


@runtime_checkable
class Sink(Protocol):
    """Another destination, such as W&B. A subclass ignores what it does not define."""

    def log(self, phase: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a phase, or of an update in supervised stages."""
        ...

    def log_samples(self, phase: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of samples."""
        return

    def log_histograms(self, phase: int, histograms: Mapping[str, Histogram]) -> None:
        """Histograms by name."""
        return

    def log_summary(self, summary: Mapping[str, float]) -> None:
        """The run's summary so far, which replaces the earlier one."""
        return

    def log_result(self, result: Mapping[str, Any], path: Path) -> None:
        """The result of a run that is done, and its folder."""
        return


OpenSinks = Callable[[], AbstractContextManager[list[Sink]]]


class RunFolder:
    """Writes a run's files. Nothing is created before the first write. The path is absolute, since
    a reward may change the working folder."""

    def __init__(self, path: Path, open_sinks: OpenSinks = lambda: nullcontext([])) -> None:
        self.path = path.absolute()
        self._open_sinks = open_sinks
        self._stack = ExitStack()
        self._sinks: list[Sink] = []
        self._broken: dict[str, int] = {}

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            attempt("closing the loggers", self._stack.close)
        else:
            self._stack.__exit__(kind, *error)

    def start(self) -> None:
        """Marks the run as running, once everything is loaded, and opens the other sinks."""
        self._sinks = self._stack.enter_context(self._open_sinks())
        write_status(self.path, "running")
        self.write_environment()

    def log(self, phase: int, metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.jsonl and passes it on. Non-finite numbers become null."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._append(METRICS, [{"phase": phase, **finite}])
        self._pass_on(lambda sink: sink.log(phase, metrics))
        if self._sinks and "eval/score" in metrics:
            # From the file, which also has the evaluations before the run was resumed.
            summary = summarize(self.rows())
            self._pass_on(lambda sink: sink.log_summary(summary))

    def log_samples(self, phase: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows to samples.jsonl with their phase, and passes them on."""
        self._append(SAMPLES, [{"phase": phase, **row} for row in rows])
        self._pass_on(lambda sink: sink.log_samples(phase, rows))

    def log_histograms(self, phase: int, histograms: Mapping[str, Histogram]) -> None:
        """Appends a row for each histogram to histograms.jsonl, and passes them on."""
        rows = [{"phase": phase, "name": name, **asdict(h)} for name, h in histograms.items()]
        self._append(HISTOGRAMS, rows)
        self._pass_on(lambda sink: sink.log_histograms(phase, histograms))

    def log_result(self, result: Mapping[str, Any]) -> None:
        """Passes on the result of a run that is done."""
        self._pass_on(lambda sink: sink.log_result(result, self.path))

    def rows(self, name: str = METRICS) -> list[dict[str, Any]]:
        """The rows so far of a file of JSON lines. Skips broken lines with a warning."""
        path = self.path / name
        # Not splitlines(), which also splits at characters that JSON leaves in a text. Text after
        # the last line end is a row that a killed run was writing.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        rows = [row for line in lines if (row := parse_row(line)) is not None]
        broken = len(lines) - len(rows)
        if broken > self._broken.get(name, 0):
            log.warning("%s: %d broken line(s) left out", path, broken)
        self._broken[name] = broken
        return rows

    def sizes(self) -> dict[str, int]:
        """The bytes of each file of rows so far."""
        files = {name: self.path / name for name in ROWS}
        return {name: file.stat().st_size for name, file in files.items() if file.exists()}

    def sync(self) -> None:
        """Waits until the disk has the rows so far."""
        for name in self.sizes():
            sync(self.path / name)

    def rewind(self, sizes: Mapping[str, int]) -> None:
        """Cuts the files back to those sizes: a resumed run writes the later rows again. Warns of
        a file that is shorter and so has lost rows."""
        for name in ROWS:
            file, size = self.path / name, sizes.get(name, 0)
            if not file.exists() and size == 0:
                continue
            if not file.exists() or file.stat().st_size < size:
                log.warning("%s has lost rows: it is shorter than at the checkpoint", file)
                file.touch()
            else:
                os.truncate(file, size)
            self._end_line(file)

    @staticmethod
    def _end_line(file: Path) -> None:
        """Ends an incomplete last line, so that the next row starts a new one."""
        with file.open("rb+") as content:
            if content.seek(0, os.SEEK_END) == 0:
                return
            content.seek(-1, os.SEEK_END)
            if content.read(1) != b"\n":
                content.write(b"\n")

    @property
    def run_id(self) -> str:
        """The run's id in W&B, which a resumed run keeps."""
        file = self.path / RUN_ID
        try:
            recorded = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            recorded = ""
        if re.fullmatch(r"[\w.-]{1,64}", recorded, re.ASCII):
            return recorded
        run_id = secrets.token_hex(4)
        write_whole(file, f"{run_id}\n")
        if recorded:
            log.warning("%s is no id of a W&B run; this run is %s", recorded, run_id)
        return run_id

    def clear(self) -> None:
        """Removes the rows and snapshots that an earlier attempt in this folder left."""
        for file in (*(self.path / name for name in ROWS), *self.path.glob("environment*.txt")):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.path / SNAPSHOTS, ignore_errors=True)

    @property
    def model(self) -> Path:
        """The folder in which a stage saves its model."""
        return self.path / MODEL

    def samples(self) -> list[dict[str, Any]]:
        """The rows of samples.jsonl so far."""
        return self.rows(SAMPLES)

    def write_result(self, content: Mapping[str, Any]) -> None:
        """Writes result.json."""
        self._write_json(RESULT, content)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes resolved_config.json."""
        self._write_json(RESOLVED_CONFIG, config)

    def write_made_of(self, description: Mapping[str, Any]) -> None:
        """Writes made_of.json, the description that an artifact's hash covers."""
        self._write_json(MADE_OF, description)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_whole(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_environment(self) -> None:
        """Writes environment.txt: the code and the machine. A run that is resumed in a different
        environment writes environment-2.txt and so on, and logs the changes as a warning."""
        lines = environment()
        file = self.path / ENVIRONMENT
        files = [file, *(file.with_stem(f"{file.stem}-{i}") for i in range(2, 99))]
        existing_files = [file for file in files if file.is_file()]
        if existing_files:
            newest = existing_files[-1].read_text(encoding="utf-8", errors="replace").splitlines()
            if newest == lines:
                return
            new = [line for line in lines if line and line not in newest]
            changes = "; ".join(line for line in new if not line.startswith(("memory", "differs")))
            log.warning("the environment has changed since the run began, so its numbers may"
                        " change: %s", changes[:300] or "what differs from the commit")  # fmt: skip
        write_whole(files[len(existing_files)], "\n".join(lines) + "\n")

    def keep_id(self, run_id: str) -> None:
        """Sets the run's id in W&B, unless it has one."""
        if not (self.path / RUN_ID).is_file():
            write_whole(self.path / RUN_ID, f"{run_id}\n")

    def _pass_on(self, call: Callable[[Sink], None]) -> None:
        """Calls each sink. One that fails is dropped with a warning: no tracker is worth a run."""
        for sink in [*self._sinks]:
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                name, reason = type(sink).__name__, f"{type(error).__name__}: {error}"
                log.warning("%s failed (%s); going on without it, the run's folder has all",
                            name, reason.splitlines()[0])  # fmt: skip

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

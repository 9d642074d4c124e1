"""Reads run folders below any path into records, even unfinished and damaged ones.

It knows files and their faults, not what the numbers mean. An unreadable file becomes a line of
`problems` with its path; the content of a folder never raises an error here. Readers of JSON lines
such as those of `datasets` refuse a whole file for one broken line.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from rlhf_exp.runs.config_keys import leaves
from rlhf_exp.runs.files import parse_object, parse_row
from rlhf_exp.runs.limit_file import LimitFile, read_limit_file
from rlhf_exp.runs.paths import (
    CHECKPOINTS,
    CONFIG,
    HYDRA,
    INSIDE,
    METRICS,
    MODEL,
    RESOLVED_CONFIG,
    RESULT,
    SAMPLES,
    SNAPSHOTS,
    STATUS,
    read_overrides,
)
from rlhf_exp.runs.samples import Sample, encodable, read_samples
from rlhf_exp.runs.status import finite_number
from rlhf_exp.settings import ConfigError

# Folders in sweeps and runs that hold no runs of their own.
NO_RUNS = {
    "wandb", CHECKPOINTS, SNAPSHOTS, INSIDE, MODEL, "report", "artifacts", "__pycache__",
}  # fmt: skip
SWEEP_FILES = {"multirun.yaml", "sweep.json"}
MAX_DEPTH = 4  # outputs/NAME/sweeps/STAMP/JOB is four below outputs
EVALUATED = ("eval/", "heldout/")


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Metrics by phase, NaN for a missing value. Each array is as long as `phases`. `nulls`: the
    phases at which a metric is null, which training writes for a number that is not finite."""

    phases: list[int]
    values: dict[str, np.ndarray]
    nulls: dict[str, list[int]]

    def last(self, name: str) -> float | None:
        """The metric's last number."""
        points = self.points(name)
        return points[-1][1] if points else None

    def points(self, name: str) -> list[tuple[int, float]]:
        """(phase, value) for each phase with a value."""
        array = self.values.get(name)
        if array is None:
            return []
        pairs = zip(self.phases, array.tolist(), strict=True)
        return [(phase, value) for phase, value in pairs if not math.isnan(value)]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: its configuration (`config`, dotted keys) and its results."""

    folder: Path
    name: str
    status: str
    error: str | None
    config: dict[str, Any]
    preset: str | None  # the option of `stage` that the command line names
    train: Curves
    evaluated: Curves
    after: dict[str, float]
    seconds: float | None
    samples: list[Sample]
    commits: tuple[str, ...]  # the commits of its code, with "+" if files differed
    limit: LimitFile | None  # what the reference's samples tell, if the run measured it

    @property
    def stage(self) -> str | None:
        """The name of the stage: its preset, else its module, as "ppo"; None if unknown."""
        target = self.config.get("stage._target_")
        if self.preset is not None or not isinstance(target, str):
            return self.preset
        return target.split(".")[-2] if "." in target else target

    @property
    def seed(self) -> int | None:
        """The run's seed, if its configuration is known."""
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None

    def curves(self, metric: str) -> Curves:
        """The set of curves that the metric belongs to."""
        return self.evaluated if metric.startswith(EVALUATED) else self.train

    def final(self, metric: str) -> float | None:
        """The metric's last value after phase 0, else its value in result.json."""
        points = self.curves(metric).points(metric)
        if points and (points[-1][0] > 0 or self.status == "done"):
            return points[-1][1]
        return self.after.get(metric)


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs at and below the paths, without duplicates, and the problems in reading them."""
    problems: list[str] = []
    folders: dict[Path, Path] = {}
    for path in paths:
        num_problems = len(problems)
        run_folders = list(_find(path, MAX_DEPTH, problems, set()))
        if not run_folders and len(problems) == num_problems:
            problems.append(f"{path}: no run in it (a run has a status.json or a metrics.jsonl)")
        for folder in run_folders:
            folders.setdefault(_resolved(folder), folder)
    names = _distinct_names(list(folders.values()))
    runs = [_read_run(folder, names[folder], problems) for folder in folders.values()]
    return runs, [encodable(problem) for problem in problems]


def read_run(path: Path) -> Run:
    """The run in a folder. Raises ConfigError with the problems unless it holds exactly one."""
    runs, problems = read_runs([path])
    if len(runs) != 1:
        reason = f"{len(runs)} runs are below it: name one" if runs else "; ".join(problems)
        raise ConfigError(f"{path} is not the folder of a run: {reason}")
    return runs[0]


def _find(path: Path, depth: int, problems: list[str], visited: set[Path]) -> Iterator[Path]:
    try:
        entries = set(os.listdir(path))
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return
    if STATUS in entries or METRICS in entries:
        yield path
        return
    if HYDRA in entries:
        problems.append(f"{path}: a job that did not start, or was killed while starting")
        return
    if _resolved(path) in visited or not depth:
        return
    visited.add(_resolved(path))
    for name in sorted(entries, key=_numerically):
        if name.startswith(".") or name in NO_RUNS or not os.path.isdir(path / name):
            continue
        count = len(problems)
        runs = list(_find(path / name, depth - 1, problems, visited))
        yield from runs
        # Job folders begin with their number.
        job = name[0].isdigit() and not SWEEP_FILES.isdisjoint(entries)
        if job and not runs and len(problems) == count:
            problems.append(f"{path / name}: no status.json and no metrics.jsonl")


def _numerically(name: str) -> tuple[float, str]:
    number = name.partition("_")[0]
    return (float(number) if number.isdecimal() else math.inf, name)


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _distinct_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder's name, with its parents' names if two are equal."""
    names = {folder: _resolved(folder).name for folder in folders}
    for level in (2, 3, 4):
        counts = Counter(names.values())
        for folder, name in names.items():
            if counts[name] > 1:
                names[folder] = "/".join(_resolved(folder).parts[-level:])
    return names


def _read_run(folder: Path, name: str, problems: list[str]) -> Run:
    status = _read_json(folder / STATUS, problems)
    result = _read_json(folder / RESULT, problems)
    state = status.get("status")
    if not isinstance(state, str):
        state = "done" if "after" in result else "unknown"
    rows = read_rows(folder / METRICS, problems, growing=state == "running")
    if not rows and state == "done":
        problems.append(f"{folder}: no metrics, though its status is done")
    train, evaluated = _curves(rows)
    after, seconds, error = result.get("after"), result.get("seconds"), status.get("error")
    return Run(
        folder=folder,
        name=encodable(name),
        status=encodable(state),
        error=None if error is None else encodable(str(error)),
        config=_read_config(folder, problems),
        preset=_read_preset(folder),
        train=train,
        evaluated=evaluated,
        after=_numbers(after) if isinstance(after, Mapping) else {},
        seconds=_numbers(seconds).get("total") if isinstance(seconds, Mapping) else None,
        samples=read_samples(folder / SAMPLES, problems),
        commits=_read_commits(folder, problems),
        limit=_read_limit(folder, problems),
    )


def read_rows(path: Path, problems: list[str], *, growing: bool) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that are objects with a phase. `growing`: a run is writing the
    file, so an unfinished last line is no problem."""
    *lines, last = _read_bytes(path, problems).split(b"\n")
    parsed = [(number, parse_row(line)) for number, line in enumerate(lines, 1) if line.strip()]
    rows = [row for _, row in parsed if row]
    wrong = [number for number, row in parsed if not row]
    if row := parse_row(last):
        rows.append(row)
    elif last.strip() and not growing:
        problems.append(f"{path}: the last line is cut off; left out")
    if wrong:
        what = "a line is" if len(wrong) == 1 else f"{len(wrong)} lines are"
        first = f"line {wrong[0]}{' first' * (len(wrong) > 1)}"
        problems.append(f"{path}: {what} not a JSON object with a phase ({first}); left out")
    return rows


def _read_bytes(path: Path, problems: list[str]) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return b""


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are finite numbers."""
    numbers = {name: finite_number(value) for name, value in row.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _curves(rows: Sequence[Mapping[str, Any]]) -> tuple[Curves, Curves]:
    """The curves of training and of evaluations. If a phase has a metric twice, the later value
    counts: a resumed run wrote it again."""
    by_phase: dict[int, dict[str, Any]] = {}
    names: dict[str, None] = {}
    for row in rows:
        by_phase.setdefault(row["phase"], {}).update(row)
        names |= dict.fromkeys(row)
    names.pop("phase", None)
    evaluated = [name for name in names if name.startswith(EVALUATED)]
    trained = [name for name in names if not name.startswith(EVALUATED)]
    return _aligned(by_phase, trained), _aligned(by_phase, evaluated)


def _aligned(by_phase: Mapping[int, Mapping[str, Any]], names: Sequence[str]) -> Curves:
    columns = set(names)
    phases = sorted(p for p, row in by_phase.items() if not columns.isdisjoint(row))
    table = [by_phase[phase] for phase in phases]
    arrays = {name: _array([row.get(name) for row in table]) for name in names}
    holes = [name for name, array in arrays.items() if np.isnan(array).any()]
    nulls = {n: [p for p in phases if by_phase[p].get(n, 0) is None] for n in holes}
    return Curves(
        phases=phases,
        values={n: array for n, array in arrays.items() if not np.isnan(array).all()},
        nulls={name: at for name, at in nulls.items() if at},
    )


def _array(values: Sequence[Any]) -> np.ndarray:
    """The values as numbers, NaN for values that are not finite numbers."""
    # Nearly all of a sweep's 900,000 values are floats, which numpy converts at once.
    if not {*map(type, values)} <= {float, NoneType}:
        values = [finite_number(value) for value in values]
    array = np.array(values, dtype=float)
    array[np.isinf(array)] = math.nan
    return array


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    content = _read_bytes(path, problems)
    if not content:
        # Not path.is_file(), which raises if the folder is not accessible.
        if os.path.isfile(path) and os.access(path, os.R_OK):
            problems.append(f"{path}: empty")
        return {}
    parsed = parse_object(content)
    if parsed is None:
        problems.append(f"{path}: not a JSON object")
    return parsed or {}


def _read_preset(folder: Path) -> str | None:
    try:
        words = read_overrides(folder)
    except ConfigError:  # a run that no command line made
        return None
    options = [word.removeprefix("stage=") for word in words if word.startswith("stage=")]
    return encodable(options[-1]) if options else None


def _read_limit(folder: Path, problems: list[str]) -> LimitFile | None:
    try:
        return read_limit_file(folder)
    except ConfigError as error:
        problems.append(str(error))
        return None


def _read_commits(folder: Path, problems: list[str]) -> tuple[str, ...]:
    """The commit in each environment file, or the hash of the code if the package was installed
    without its repository; a resumed run may have several."""
    # environment.txt, environment-2.txt and so on.
    files = sorted(folder.glob("environment*.txt"), key=lambda file: (len(file.name), file.name))
    lines = [line for f in files for line in _read_bytes(f, problems).splitlines()[:2]]
    matches = [re.match(rb"commit (\S+)$|code (\S+) of ", line) for line in lines]
    names = [(m[1] or m[2]).decode(errors="replace") for m in matches if m]
    return tuple(dict.fromkeys(encodable(name) for name in names if name != "none"))


def _read_config(folder: Path, problems: list[str]) -> dict[str, Any]:
    """The resolved configuration with dotted keys, else Hydra's, in which ${...} stays text."""
    config = _read_json(folder / RESOLVED_CONFIG, problems)
    path = folder / CONFIG
    if not config and os.path.isfile(path):
        try:
            config = yaml.safe_load(_read_bytes(path, problems))
        except (yaml.YAMLError, ValueError, RecursionError):
            config = {}
        if not isinstance(config, dict) or not config:
            problems.append(f"{path}: not a YAML mapping")
            config = {}
    if not config:
        problems.append(f"{folder}: no configuration: its parameters and seed are unknown")
    return dict(leaves(_plain(config)))


def _plain(config: Mapping[Any, Any]) -> dict[str, Any]:
    """The configuration as JSON can hold it: YAML also has dates, infinity and lists as keys."""
    text = json.dumps(config, default=str, ensure_ascii=False, skipkeys=True)
    plain: dict[str, Any] = json.loads(encodable(text), parse_constant=str)
    return plain

"""A running sweep's display: a live table on a terminal, elsewhere a line for each job that starts
or ends; and the table at its end.

Rich draws it. The states come from the jobs' files, because Hydra's launchers report nothing before
a job ends.
"""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlhf_exp.runs.paths import LOG
from rlhf_exp.runs.status import JobState, read_state
from rlhf_exp.sweeps.jobs import SweepJob

POLL_S = 0.5
COLORS = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}
ENDED = {"done", "failed", "interrupted"}
WIDE = 60  # columns from which a terminal shows the time left of each job
ORDER = ("running", "failed", "interrupted", "waiting", "done")  # a short terminal shows the first


class Monitor:
    """Watches the folders of jobs from a separate thread. Use as a context manager."""

    def __init__(self, jobs: Sequence[SweepJob], console: Console, *, title: str = "") -> None:
        self._jobs, self._console, self._title = jobs, console, title
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        self._states = {job.number: read_state(job.folder) for job in jobs}
        self._began: dict[int, tuple[float, int]] = {}  # time and phase of a job's first sighting
        self._took: list[float] = []
        self._started: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Monitor":
        if self._is_live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        if self._is_live:
            # Otherwise it is drawn in full once more, and lines off the screen cannot be removed.
            self._live.update("")
            self._live.stop()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        for job in self._jobs:
            before, state = self._states[job.number], read_state(job.folder)
            self._states[job.number] = state
            if state.status == "running" and state.phase is not None:
                self._began.setdefault(job.number, (now, state.phase))
            if before.status != state.status:
                self._say_change(job, state, now)
        if self._is_live:
            self._live.update(self._picture(now), refresh=True)

    def _say_change(self, job: SweepJob, state: JobState, now: float) -> None:
        if state.status == "running":
            self._started[job.number] = now
        elif state.status in ENDED and job.number in self._started:
            self._took.append(now - self._started[job.number])
        if self._is_live and state.status != "failed":
            return
        line = Text(f"job {job.number} ({job.label}) {_word(state)}")
        if state.status in ENDED:
            line.append(f"  [{self._title}{self._count()}]")
        self._console.print(line, soft_wrap=True)

    def _count(self) -> str:
        counts = Counter(state.status for state in self._states.values())
        statuses = [status for status in ("done", *ORDER[:-1]) if counts[status]]
        return ", ".join(f"{counts[status]} {status}" for status in statuses)

    def _picture(self, now: float) -> Group:
        left = self._seconds_left(now)
        about = "" if left is None else f"; about {duration(left)} left"
        rows = sorted(
            self._jobs, key=lambda job: (ORDER.index(self._states[job.number].status), job.number)
        )
        room = max(3, self._console.height - 6)
        table = _new_table(one_line=True)
        is_wide = self._console.width >= WIDE
        if is_wide:
            table.add_column("ETA", no_wrap=True)
        for job in sorted(rows[:room], key=lambda job: job.number):
            state = self._states[job.number]
            eta = [self._eta(job, state, now)] if is_wide else []
            _add_row(table, job, state, *eta)
        more = [Text(f"{len(rows) - room} more")] if len(rows) > room else []
        return Group(Text(f"{self._title}{self._count()}{about}", no_wrap=True), table, *more)

    def _eta(self, job: SweepJob, state: JobState, now: float) -> str:
        if state.status != "running" or job.phases is None or job.number not in self._began:
            return ""
        began, phase = self._began[job.number]
        done = (state.phase or 0) - phase
        return duration((now - began) / done * (job.phases - phase - done)) if done > 0 else ""

    def _seconds_left(self, now: float) -> float | None:
        if not self._took:
            return None
        mean = sum(self._took) / len(self._took)
        statuses = {number: state.status for number, state in self._states.items()}
        running = [now - self._started.get(n, now) for n, s in statuses.items() if s == "running"]
        waiting = list(statuses.values()).count("waiting")
        work = sum(max(0.0, mean - spent) for spent in running) + waiting * mean
        return work / max(1, len(running))


def summary(jobs: Sequence[SweepJob]) -> Table:
    """The table at the end of a sweep: every job with its last score and KL."""
    table = _new_table()
    for job in jobs:
        _add_row(table, job, read_state(job.folder))
    return table


def show_plan(
    jobs: Sequence[SweepJob], console: Console, *, at_once: int, trials: int | None = None
) -> None:
    """Prints the jobs that a sweep would run, their folders and expected seconds; for a search, the
    ends of its space and the expected seconds of its `trials`."""
    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right")
    for name in ("job", "folder", "now"):
        table.add_column(name, overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    left: list[float | None] = []
    for job in jobs:
        status = read_state(job.folder).status
        done = status == "done"
        left += [] if done else [job.seconds]
        number = "" if trials else str(job.number)
        words = [number, job.label.replace(",", ", "), "" if trials else job.folder.name]
        now = "is right" if trials else "to run" if status == "waiting" else status
        time_ = "" if done or job.seconds is None else duration(job.seconds)
        table.add_row(*(Text(word) for word in (*words, now, time_)))
    console.print(table)
    durations = [seconds for seconds in left if seconds is not None]
    estimate = "unknown: no finished run of this shape is there to judge by"
    if durations:
        count = trials or len(left)
        total = sum(durations) / len(durations) * count / max(1, min(at_once, count))
        estimate = f"about {duration(total)}, {at_once} at a time; what prepare builds comes on top"
    folder = jobs[0].folder.parent if jobs else "none"
    what = f"{len(left)} of {len(jobs)} jobs to run, in {folder}"
    if trials:
        what = f"both ends of each interval are right; {trials} trials to run"
    line = f"{what}; time: {estimate}; nothing was started"
    console.print(Text(line), soft_wrap=True)


def problems(jobs: Sequence[SweepJob]) -> list[str]:
    """A line for each job that is not done: its name, the reason, and its log."""
    lines = []
    for job in jobs:
        state = read_state(job.folder)
        if state.status != "done":
            log = job.folder / LOG
            hint = f"; see {log}" if log.is_file() else ""
            lines.append(f"job {job.number} ({job.label}) {_word(state)}{hint}")
    return lines


def duration(seconds: float) -> str:
    """Seconds in readable units: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _word(state: JobState) -> str:
    if state.status == "failed":
        return f"failed: {(state.error or 'no reason was given').splitlines()[0]}"
    if state.status == "done" and state.score is not None:
        kl = "" if state.kl is None else f", KL {_number(state.kl)}"
        return f"done: score {_number(state.score)}{kl}"
    if state.status == "running" and state.gpu is not None:
        return f"started on GPU {state.gpu}"
    return {"waiting": "did not start", "running": "started"}.get(state.status, state.status)


def _new_table(*, one_line: bool = False) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("job", overflow="ellipsis" if one_line else "fold", no_wrap=one_line)
    table.add_column("status", no_wrap=True)
    for name in ("phase", "score", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_row(table: Table, job: SweepJob, state: JobState, *more: str) -> None:
    phase = "" if state.phase is None else str(state.phase)
    if phase and job.phases is not None:
        phase = f"{phase}/{job.phases}"
    cells: list[Any] = [str(job.number), Text(job.label.replace(",", ", "))]
    on_gpu = state.status == "running" and state.gpu is not None
    status = f"{state.status}, GPU {state.gpu}" if on_gpu else state.status
    cells.append(Text(status, style=COLORS.get(state.status, "dim")))
    table.add_row(*cells, phase, _number(state.score), _number(state.kl), *more)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

"""trackio: metrics, samples and histograms of a run in its database on this machine."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rlhf_exp.machine.network import without_hub
from rlhf_exp.runs.folder import TABLE_ROWS, Sink
from rlhf_exp.runs.summary import Histogram
from rlhf_exp.settings import Text, settings
from rlhf_exp.tracking.protocol import RunInfo, missing_package


@settings
class TrackioLogger:
    """A run in the database below TRACKIO_DIR, or ~/.cache/huggingface/trackio."""

    project: Text = "rlhf_exp"
    """Project in trackio's database; trackio show --project NAME shows its runs."""

    def problems(self, *, name: str, group: str | None) -> list[str]:
        """A line if trackio is not installed."""
        return missing_package("trackio")

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[list[Sink]]:
        """The sink to the run, which a resumed run continues. Asks the hub nothing."""
        with without_hub(), redirect_stdout(io.StringIO()):
            import trackio

            options = {"resume": "allow", "auto_log_cpu": False, "auto_log_gpu": False}
            name = f"{info.name}-{info.run_id}"
            run = trackio.init(self.project, name, info.group, config={**info.config}, **options)
        try:
            yield [TrackioSink(run, trackio)]
        finally:
            with redirect_stdout(io.StringIO()):
                trackio.finish()


class TrackioSink(Sink):
    """Logs each value at the step of its phase."""

    def __init__(self, run: Any, trackio: Any) -> None:
        self._run, self._trackio = run, trackio

    def log(self, phase: int, metrics: Mapping[str, float]) -> None:
        """A row of metrics."""
        self._run.log(dict(metrics), step=phase)

    def log_samples(self, phase: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The first rows as a table under the key `samples`."""
        self._run.log({"samples": self._trackio.Table(data=[*rows[:TABLE_ROWS]])}, step=phase)

    def log_histograms(self, phase: int, histograms: Mapping[str, Histogram]) -> None:
        """The histograms by their names, below `histogram/`."""
        kind, pairs = self._trackio.Histogram, histograms.items()
        row = {f"histogram/{n}": kind(np_histogram=(h.counts, h.edges)) for n, h in pairs}
        self._run.log(row, step=phase)

"""TensorBoard: metrics, samples and histograms of a run in event files on this machine."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rlhf_exp.runs.folder import TABLE_ROWS, Sink
from rlhf_exp.runs.summary import Histogram
from rlhf_exp.settings import settings
from rlhf_exp.tracking.protocol import RunInfo, missing_package


@settings
class TensorBoardLogger:
    """Event files below `tensorboard/`, in the folder of the run or of its sweep."""

    def problems(self, *, name: str, group: str | None) -> list[str]:
        """A line if TensorBoard is not installed."""
        return missing_package("tensorboard")

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[list[Sink]]:
        """The sink to the run's event files."""
        with ExitStack() as stack:
            yield [TensorBoardSink(info.shared_folder / "tensorboard" / info.name, stack)]


class TensorBoardSink(Sink):
    """Writes each value at the step of its phase; the stack closes the event file."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack, self._writer = str(folder), stack, None

    def log(self, phase: int, metrics: Mapping[str, float]) -> None:
        """A scalar for each metric."""
        for name, value in metrics.items():
            self._at(phase).add_scalar(name, value, phase)
        self._at(phase).flush()

    def log_samples(self, phase: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The first rows as texts, under the tag `samples`."""
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows[:TABLE_ROWS])
        if rows:
            self._at(phase).add_text("samples", f"```\n{lines}\n```", phase)

    def log_histograms(self, phase: int, histograms: Mapping[str, Histogram]) -> None:
        """The histograms by their names, below `histogram/`. TensorBoard shows the bins alone."""
        for name, h in histograms.items():
            numbers = h.edges[0], h.edges[-1], sum(h.counts), 0, 0, h.edges[1:], h.counts
            self._at(phase).add_histogram_raw(f"histogram/{name}", *numbers, phase)

    def _at(self, phase: int) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run logs again what came after its checkpoint: the old values are purged.
            self._writer = self._stack.enter_context(SummaryWriter(self._folder, purge_step=phase))
        return self._writer

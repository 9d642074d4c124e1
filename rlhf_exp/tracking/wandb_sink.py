"""Logs a run to W&B: metrics by phase, tables of samples, histograms, a summary, the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.runs.folder import TABLE_ROWS
from rlhf_exp.runs.summary import Histogram
from rlhf_exp.tracking.wandb_thread import WandbRun


class WandbSink:
    """The sink to a W&B run. Every row has its phase, which is the axis of all charts."""

    def __init__(self, run: WandbRun, *, log_model: bool) -> None:
        self._run, self._log_model = run, log_model

    def log(self, phase: int, metrics: Mapping[str, float]) -> None:
        """Logs a row of metrics."""
        row = {"phase": phase, **metrics}
        self._run.call(lambda run: run.log(row))

    def log_samples(self, phase: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs the first rows as a new table under the key `samples`. Runs with the same prompts
        list them in the same order, so that their tables can be joined."""
        table_rows = [{"phase": phase, **row} for row in rows[:TABLE_ROWS]]
        if not table_rows:
            return
        columns = list(table_rows[0])

        def send(run: Any) -> None:
            import wandb

            # A new table each time: W&B ignores rows that are added to a logged one.
            table = wandb.Table(
                columns=columns, data=[[row[c] for c in columns] for row in table_rows]
            )
            run.log({"phase": phase, "samples": table})

        self._run.call(send)

    def log_histograms(self, phase: int, histograms: Mapping[str, Histogram]) -> None:
        """Logs each histogram under `histogram/NAME`."""

        def send(run: Any) -> None:
            import wandb

            row = {
                f"histogram/{name}": wandb.Histogram(np_histogram=(list(h.counts), list(h.edges)))
                for name, h in histograms.items()
            }
            run.log({"phase": phase, **row})

        self._run.call(send)

    def log_summary(self, summary: Mapping[str, float]) -> None:
        """Adds the values to the summary, where W&B itself writes the last value of each metric."""
        self._run.call(lambda run: run.summary.update(dict(summary)))

    def log_result(self, result: Mapping[str, Any], path: Path) -> None:
        """Uploads `model/` as an artifact with the result as metadata, if log_model is true."""
        model = path / "model"
        if not self._log_model or not model.is_dir():
            return

        def send(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=dict(result))
            for file in sorted(file for file in model.absolute().rglob("*") if file.is_file()):
                name = file.relative_to(model.absolute()).as_posix()
                # Uploaded without a copy: nothing writes to the folder of a run that is done.
                artifact.add_file(str(file), name, policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

        self._run.call(send)

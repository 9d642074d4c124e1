"""The report on a sweep as a W&B run in the sweep's group: its figures, a table of its runs, its
page. Like any logger it works offline without a network, and skips a W&B that fails."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.report.grouping import settings_of, varied_parameters
from rlhf_exp.runs.reading import Run, read_runs
from rlhf_exp.settings import ConfigError
from rlhf_exp.tracking.protocol import RunInfo
from rlhf_exp.tracking.wandb_logger import MAX_NAME, WandbLogger

MAX_PAGE_BYTES = 20 * 2**20  # what W&B shows inline


def log_report(folder: Path, pictures: Sequence[Path], *, page: Path | None = None) -> None:
    """Logs the pictures, the page unless it is too large, and a row for each run below `folder`,
    as one run of job type `report` in the group of the sweep, whose wandb/ folder it shares. Raises
    ConfigError if there is no run, or if the runs' logger.mode is online and the server refuses."""
    runs, problems = read_runs([folder])
    if not runs:
        raise ConfigError("\n".join(problems))
    columns, rows = tabulate_runs(runs)
    info = RunInfo(
        name=f"report on {folder.resolve().name}"[:MAX_NAME],
        group=folder.resolve().name[:MAX_NAME],
        job_type="report",
        config={"runs": [run.name for run in runs]},
        shared_folder=folder,
    )

    def send(run: Any) -> None:
        import wandb

        media: dict[str, Any] = {"runs": wandb.Table(columns, rows, allow_mixed_types=True)}
        for picture in pictures:
            media[f"figures/{picture.stem}"] = wandb.Image(str(picture))
        if page is not None and page.stat().st_size < MAX_PAGE_BYTES:
            media["report"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
        run.log(media)

    with _logger_of(runs).connect(info) as connection:
        if connection is not None:
            connection.call(send)


def tabulate_runs(runs: Sequence[Run]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: each run with the parameters that vary, its best evaluation, and the last
    value of each evaluation metric; None for a missing value."""
    parameters = varied_parameters(runs)
    metrics = sorted({name for run in runs for name in run.evaluated.values})
    columns = ["run", "status", *parameters, "best/eval_score", "best/phase", *metrics]
    return columns, [
        [
            run.name,
            run.status,
            *(_cell(value) for value in settings_of(run, parameters).values()),
            *_best(run),
            *(run.evaluated.last(name) for name in metrics),
        ]
        for run in runs
    ]


def _best(run: Run) -> tuple[float | None, int | None]:
    points = [(score, phase) for phase, score in run.evaluated.points("eval/score")]
    return max(points, key=lambda point: point[0], default=(None, None))


def _cell(value: Any) -> Any:
    # A column of W&B has one type, and no lists.
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _logger_of(runs: Sequence[Run]) -> WandbLogger:
    """The runs' W&B settings, or the defaults if they did not use W&B."""
    settings = {
        name: run.config[f"logger.{name}"]
        for run in runs[:1]
        for name in ("project", "entity", "mode")
        if run.config.get(f"logger.{name}") not in (None, "disabled")
    }
    return WandbLogger(**settings)

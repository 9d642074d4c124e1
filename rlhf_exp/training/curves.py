"""Pictures and tables at the end of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

INK, MUTED, SCORE, KL = "#222222", "#8a8a8a", "#0b6e4f", "#b3541e"


def plot_score_and_kl(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> Path:
    """A PNG of score and KL by phase from rows of metrics.jsonl: rollouts as lines, evaluations as
    dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    panels = (("scores", "score", SCORE), ("kl", "KL to reference\n(nats a token)", KL))
    for axis, (metric, label, color) in zip(axes, panels, strict=True):
        rollouts = _series(rows, f"objective/{metric}")
        evaluations = _series(rows, f"eval/{metric.removesuffix('s')}")
        axis.plot(*rollouts, color=color, linewidth=1.2, alpha=0.55, label="rollouts")
        axis.plot(
            *evaluations,
            "o",
            color=color,
            markersize=6,
            clip_on=False,
            label="evaluation, fresh samples",
        )
        axis.set_ylabel(label, color=INK)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=MUTED)
    axes[0].legend(frameon=False, loc="lower right", labelcolor=INK)
    axes[0].set_title(title, loc="left", color=INK, fontsize=11)
    axes[1].set_xlabel("phase", color=INK)
    axes[1].set_ylim(bottom=0)
    figure.savefig(path, dpi=130)
    return path


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["phase"], row[name]) for row in rows if row.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def print_before_after(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], console: Console
) -> None:
    """A table of the same prompts' completions before and after, with their scores."""
    table = Table(title="the same prompts, before and after", show_lines=True, expand=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("before", ratio=1)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("after", ratio=1)
    for old, new in zip(before, after, strict=True):
        table.add_row(f"{old['score']:.2f}", _sample(old), f"{new['score']:.2f}", _sample(new))
    console.print(table)


def _sample(row: Mapping[str, Any]) -> Text:
    # Text, not markup: a completion may hold anything.
    return Text(row["prompt"], style="dim").append(Text(row["completion"], style="not dim"))

"""Figures and tables at the end of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_exp.runs.context import Context
from rlhf_exp.security.printable import printable

INK, MUTED = "#222222", "#8a8a8a"
SCORE, KL, TRUE = "#0b6e4f", "#b3541e", "#2c5aa0"


def plot_ppo(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> Path:
    """A PNG of score and KL by phase from rows of metrics.jsonl: rollouts as lines, evaluations as
    dots. Where the task knows exact answers, the true reward stands beside the score, the gap
    between them is filled, and exact-match rates have a panel of their own."""
    exact = any("eval/exact_match" in row for row in rows)
    figure, panels = _make_panels(3 if exact else 2, title=title)
    score, kl = panels[0], panels[-1]
    for axis, metric, color in ((score, "scores", SCORE), (kl, "kl", KL)):
        rollouts = _series(rows, f"objective/{metric}")
        axis.plot(*rollouts, color=color, linewidth=1.2, alpha=0.55, label="rollouts")
        phases, values = _series(rows, f"eval/{metric.removesuffix('s')}")
        dots = {"color": color, "markersize": 6, "clip_on": False}
        axis.plot(phases, values, "o", label="evaluation, fresh samples", **dots)
        if exact and metric == "scores":
            true = _series(rows, "eval/true_reward")[1]
            axis.plot(
                phases, true, "D", color=TRUE, markersize=5, clip_on=False, label="true reward"
            )
            axis.fill_between(phases, values, true, color=MUTED, alpha=0.25, label="gap")
    if exact:
        for name, marker in (("exact_match", "o-"), ("greedy_exact_match", "s--")):
            label = "greedy" if name.startswith("greedy") else "sampled"
            points = _series(rows, f"eval/{name}")
            panels[1].plot(*points, marker, color=TRUE, linewidth=1, markersize=5, label=label)
        panels[1].set_ylim(0, 1)
        panels[1].legend(frameon=False, loc="lower right", labelcolor=INK)
        panels[1].set_ylabel("exact match\n(held-out prompts)", color=INK)
    score.legend(frameon=False, loc="lower right", labelcolor=INK)
    score.set_ylabel("score", color=INK)
    kl.set_ylabel("KL to reference\n(nats a token)", color=INK)
    kl.set_xlabel("phase", color=INK)
    kl.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)
    return path


def plot_best_of_n(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> Path:
    """A PNG of score against KL from rows of metrics.jsonl, a dot for each n; where the task knows
    exact answers, of the true reward too."""
    figure, (axis,) = _make_panels(1, title=title)
    kls = [row["eval/kl_sum"] for row in rows]
    for name, color, label in (("score", SCORE, "score"), ("true_reward", TRUE, "true reward")):
        _, values = _series(rows, f"eval/{name}")
        if values:
            axis.plot(kls, values, "o-", color=color, linewidth=1, markersize=5, label=label)
    for kl, row in zip(kls, rows, strict=True):
        axis.annotate(f"{row['phase']}", (kl, row["eval/score"]), xytext=(4, -11),
                      textcoords="offset points", fontsize=8, color=MUTED)  # fmt: skip
    axis.legend(frameon=False, loc="lower right", labelcolor=INK)
    axis.set_xlabel("KL to the model (nats a completion); numbers: n", color=INK)
    axis.set_ylabel("score", color=INK)
    figure.savefig(path, dpi=130)
    return path


def plot_supervised(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> Path:
    """A PNG of the losses by update, and of the exact-match rate if there is one, from rows of
    metrics.jsonl."""
    exact = _series(rows, "heldout/exact_match")
    figure, panels = _make_panels(2 if exact[0] else 1, title=title)
    loss = panels[0]
    loss.plot(*_series(rows, "train/loss"), color=SCORE, linewidth=1.2, alpha=0.7, label="batches")
    held_out = _series(rows, "heldout/loss")
    loss.plot(*held_out, "o", color=KL, markersize=5, label="held-out examples")
    loss.set_ylabel("loss", color=INK)
    loss.legend(frameon=False, loc="upper right", labelcolor=INK)
    if exact[0]:
        panels[1].plot(*exact, "o-", color=TRUE, linewidth=1, markersize=4)
        panels[1].set_ylabel("exact match\n(held-out prompts, sampled)", color=INK)
        panels[1].set_ylim(0, 1)
    panels[-1].set_xlabel("update", color=INK)
    figure.savefig(path, dpi=130)
    return path


def queue_loss_plot(context: Context, *, title: str) -> None:
    """Queues loss.png, which is drawn after the result of a supervised stage is written."""
    folder = context.folder
    context.presentation.add(
        "loss.png", lambda: plot_supervised(folder.rows(), folder.path / "loss.png", title=title)
    )


def plot_predictions(
    true: Sequence[float], predicted: Sequence[float], path: Path, *, title: str
) -> Path:
    """A PNG of true against predicted rewards: each answer as a dot, and the means of ten equally
    large groups of answers, sorted by prediction. A calibrated model is on the diagonal."""
    import numpy as np

    figure, (scatter, groups) = _make_panels(2, title=title, side_by_side=True)
    ends = [min(*true, *predicted), max(*true, *predicted)]
    scatter.plot(predicted, true, ".", color=SCORE, markersize=3, alpha=0.4)
    scatter.set_ylabel("true reward", color=INK)
    order = np.argsort(np.asarray(predicted), kind="stable")
    tenths = [tenth for tenth in np.array_split(order, 10) if len(tenth)]
    means = [
        [float(np.mean(np.asarray(values)[tenth])) for tenth in tenths]
        for values in (predicted, true)
    ]
    groups.plot(*means, "o-", color=TRUE, markersize=6, linewidth=1)
    groups.set_ylabel("mean true reward of a tenth", color=INK)
    for axis in (scatter, groups):
        axis.plot(ends, ends, color=MUTED, linewidth=0.8, zorder=0)
        axis.set_xlabel("predicted reward", color=INK)
    figure.savefig(path, dpi=130)
    return path


def plot_margins(margins: Sequence[float], path: Path, *, title: str) -> Path:
    """A PNG of the margins, score of chosen - score of rejected: a histogram, and the share of
    correctly ordered pairs against the model's probability in ten equally large groups."""
    import numpy as np

    figure, (histogram, groups) = _make_panels(2, title=title, side_by_side=True)
    histogram.hist(margins, bins=40, color=SCORE, alpha=0.7)
    histogram.axvline(0, color=MUTED, linewidth=0.8)
    histogram.set_xlabel("score of chosen - score of rejected", color=INK)
    histogram.set_ylabel("pairs", color=INK)
    values = np.asarray(margins)
    order = np.argsort(np.abs(values), kind="stable")
    tenths = [tenth for tenth in np.array_split(order, 10) if len(tenth)]
    probabilities = [float(np.mean(1 / (1 + np.exp(-np.abs(values[t]))))) for t in tenths]
    shares = [float(np.mean(values[t] > 0)) for t in tenths]
    groups.plot(probabilities, shares, "o-", color=TRUE, markersize=6, linewidth=1)
    groups.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.8, zorder=0)
    groups.set_xlabel("claimed probability of the order", color=INK)
    groups.set_ylabel("share of pairs in that order", color=INK)
    figure.savefig(path, dpi=130)
    return path


def _make_panels(count: int, *, title: str, side_by_side: bool = False) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    size = (9, 4.2) if side_by_side else (7, 1 + 2 * count)
    figure = Figure(figsize=size, layout="constrained")
    shape = (1, count) if side_by_side else (count, 1)
    axes = figure.subplots(*shape, sharex=not side_by_side, squeeze=False).flatten().tolist()
    for axis in axes:
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=MUTED)
    axes[0].set_title(title, loc="left", color=INK, fontsize=11)
    return figure, axes


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["phase"], row[name]) for row in rows if row.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def print_before_after(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], console: Console
) -> None:
    """A table of the same prompts' completions before and after, with their scores if they have
    any."""
    table = Table(title="the same prompts, before and after", show_lines=True, expand=True)
    scored = all("score" in row for row in (*before, *after))
    for name in ("before", "after"):
        if scored:
            table.add_column("score", justify="right", no_wrap=True)
        table.add_column(name, ratio=1)
    for old, new in zip(before, after, strict=True):
        cells = (_score(old), _sample(old), _score(new), _sample(new))
        table.add_row(*(cells if scored else cells[1::2]))
    console.print(table)


def _score(row: Mapping[str, Any]) -> str:
    score = row.get("score", 0.0)
    return f"{score:.2f}" if abs(score) < 1e9 else f"{score:.2e}"


def _sample(row: Mapping[str, Any]) -> Text:
    # Text, not markup: a completion may hold anything.
    completion = Text(printable(row["completion"]), style="not dim")
    return Text(printable(row["prompt"]), style="dim").append(completion)

"""The panels of the pictures, in the report's style."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.tracking.curves import INK, MUTED

# After Okabe and Ito, distinct for color-blind readers too; the report has the same.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b5559a", "#b98100", "#3a9bd9")


def make_panels(count: int, *, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(math.ceil(count / columns), columns, squeeze=False).flatten().tolist()
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=MUTED, labelcolor=INK, labelsize=8)
    return figure, axes[:count]


def bars(
    axis: Any, labels: Sequence[str], means: Sequence[Mapping[str, float | None]], *, color: str
) -> None:
    """Horizontal bars from the top down, with intervals where they are known."""
    places = range(len(labels), 0, -1)
    axis.barh(places, [mean["mean"] or 0 for mean in means], color=color, alpha=0.75)
    for place, mean in zip(places, means, strict=True):
        if mean["low"] is not None:
            axis.plot([mean["low"], mean["high"]], [place, place], color=INK, linewidth=1)
    axis.set_yticks(places, labels)
    axis.grid(visible=False, axis="y")
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)


def blocks(axis: Any) -> None:
    """The x axis counts the model's blocks."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("block", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def save(figure: Any, path: Path) -> Path:
    """Writes the PNG and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path

"""The report's pictures as PNGs: the frontiers, the curves, the costs, the parameters.

It draws a payload and computes nothing.
"""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.report.grouping import short_names, show_value
from rlhf_exp.report.wording import COST_NAMES, INTERVALS, best_first, pareto_groups
from rlhf_exp.tracking.curves import INK, MUTED, SCORE

log = logging.getLogger(__name__)

# After Okabe and Ito, distinct for color-blind readers too; the HTML page uses the same.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b5559a", "#b98100", "#3a9bd9", "#5b4fa2", "#7a5c3e")
CURVES = (
    ("train", "objective/scores"),
    ("train", "objective/kl"),
    ("train", "objective/entropy"),
    ("train", "sample/distinct_3"),
    ("train", "val/explained_variance"),
    ("train", "policy/clipfrac"),
    ("train", "train/loss"),
    ("eval", "heldout/loss"),
    ("eval", "heldout/accuracy"),
)
ENDS = ("mean", "low", "high")
MAX_LABEL = 24  # characters of the longest label that fits beside its dot
MAX_TICKS = 6  # up to this many different numbers become the axis's ticks
MIN_LOG_RATIO = 8  # the axis is logarithmic from this ratio of the largest to the smallest value


def write_figures(payload: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws frontier.png, true_reward.png, curves.png, costs.png and parameters.png, as far as the
    payload has their data, and returns their paths. Warns of a figure that cannot be drawn and
    leaves it out; raises OSError if the folder cannot be written."""
    paths = []
    for draw in (draw_frontier, draw_true_reward, draw_curves, draw_costs, draw_parameters):
        try:
            paths.append(draw(payload, folder))
        except OSError:
            raise
        except Exception as error:
            name = draw.__name__.removeprefix("draw_")
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("%s.png failed (%s); the report goes on without it", name, reason)
    return [path for path in paths if path is not None]


def draw_true_reward(payload: Mapping[str, Any], folder: Path) -> Path | None:
    """Draws the true reward against KL as `draw_frontier` draws the score. None if no run knows a
    true reward."""
    if payload["true_reward"] is None:
        return None
    groups = [{**group, **group["true_reward"]} for group in payload["groups"]]
    view = {**payload, **payload["true_reward"], "groups": groups}
    return draw_frontier(view, folder, name="true_reward.png")


def draw_frontier(
    payload: Mapping[str, Any], folder: Path, *, name: str = "frontier.png"
) -> Path | None:
    """Draws score against KL: each group's final mean with its interval, the Pareto front, the
    model before training, the chosen groups' paths over the phases, the lines of the best of n
    samples, and the limit as far as the groups reach. None if no group has both metrics."""
    groups = [
        group
        for group in payload["groups"]
        if group["score"]["mean"] is not None and group["kl"]["mean"] is not None
    ]
    if not groups:
        return None
    figure, (axis,) = _make_panels(1, columns=1, size=(8.0, 5.0))
    colors = _colors(payload)
    chosen_ids = {group["id"] for group in choose_groups({**payload, "groups": groups})}
    labels_fit = all(len(group["label"]) <= MAX_LABEL for group in groups)
    front = sorted((g["kl"]["mean"], g["score"]["mean"]) for g in groups if g["pareto"])
    axis.plot(*zip(*front, strict=True), color=MUTED, linewidth=1, linestyle="--", zorder=1,
              drawstyle="steps-post", label="Pareto front")  # fmt: skip
    for group in groups:
        color, on_front = colors[group["id"]], group["pareto"]
        is_chosen = group["id"] in chosen_ids
        by_n = group["path_axis"] == "n"  # a line of points to choose from, not a history
        path = [(p["kl"], p["score"]) for p in group["path"]] if is_chosen or by_n else []
        if path:
            axis.plot(*zip(*path, strict=True), ".-" if by_n else "-", color=color, linewidth=0.8,
                      alpha=1 if by_n else 0.4, zorder=2)  # fmt: skip
        kl, score = group["kl"], group["score"]
        axis.errorbar(
            kl["mean"], score["mean"], xerr=_error(kl), yerr=_error(score), fmt="o", color=color,
            markersize=8 if on_front else 5, markerfacecolor=color if on_front else "white",
            elinewidth=1, capsize=2, zorder=3 + is_chosen,
            label=_label(group) if is_chosen and not labels_fit else None,
        )  # fmt: skip
        if is_chosen and labels_fit:
            axis.annotate(_label(group), (kl["mean"], score["mean"]), xytext=(7, -11),
                          textcoords="offset points", fontsize=8, color=color)  # fmt: skip
    if before := payload["before"]:
        kl, score = before["kl"], before["score"]
        axis.errorbar(kl["mean"], score["mean"], xerr=_error(kl), yerr=_error(score), fmt="D",
                      color=INK, markersize=5, markerfacecolor="white", elinewidth=1, capsize=2,
                      zorder=2, label="before training")  # fmt: skip
    axis.margins(x=0.12)
    draw_limits(axis, payload["limits"], most=axis.get_xlim()[1])
    unit = {"kl": " (nats a token)", "kl_sum": " (nats a completion)"}
    axis.set_xlabel(f"{payload['kl']}{unit.get(payload['kl'].rpartition('/')[2], '')}", color=INK)
    axis.set_ylabel(payload["score"], color=INK)
    by_n = any(group["path_axis"] == "n" for group in groups)
    of_n = "; lines through points: the best of n samples" if by_n else ""
    what = "true reward" if name == "true_reward.png" else "score"
    axis.set_title(f"{what} against KL: lines by phase, dots at the end, filled on the front\n"
                   f"bars: {INTERVALS}{of_n}", loc="left", color=INK, fontsize=10)  # fmt: skip
    if labels_fit:
        axis.legend(frameon=False, loc="lower right", labelcolor=INK, fontsize=8)
    else:
        figure.set_size_inches(8, 6.2)
        _legend_below(figure, [axis])
    return _save(figure, folder / name)


def draw_limits(axis: Any, limits: Sequence[Mapping[str, Any]], *, most: float = math.inf) -> None:
    """Draws each limit up to a KL of `most`."""
    for limit, style in zip(limits, itertools.cycle(("-", "--", "-.", ":")), strict=False):
        points = [(p["kl"], p["score"]) for p in limit["points"] if p["kl"] <= most]
        name = f"limit: {_label(limit) or 'the best at each KL'}"
        axis.plot(*zip(*points, strict=True), style, color=INK, linewidth=1.4, zorder=2,
                  label=name)  # fmt: skip


def draw_limit_alone(payload: Mapping[str, Any], folder: Path) -> Path:
    """Draws limit.png for a run of stage=best_of_n: the limit, and the best of n samples for each n
    up to a quarter of the samples, beyond which its KL is inexact; then of the true reward, if the
    task knows it."""
    views = [payload]
    if payload["true_reward"] is not None:
        groups = [{**group, **group["true_reward"]} for group in payload["groups"]]
        views.append({**payload, **payload["true_reward"], "groups": groups})
    figure, panels = _make_panels(len(views), columns=2, size=(1.0 + 6.0 * len(views), 4.5))
    for axis, view in zip(panels, views, strict=True):
        draw_limits(axis, view["limits"])
        path = view["groups"][0]["path"]
        exact = [point for point in path if 4 * point["phase"] <= path[-1]["phase"]]
        axis.plot([p["kl"] for p in exact], [p["score"] for p in exact], ".-", color=COLORS[0],
                  linewidth=0.8, label="the best of n samples")  # fmt: skip
        for point in exact:
            axis.annotate(str(point["phase"]), (point["kl"], point["score"]), xytext=(5, -9),
                          textcoords="offset points", fontsize=8, color=COLORS[0])  # fmt: skip
        axis.set_xlabel("KL to the model, nats a completion", color=INK)
        axis.set_ylabel(view["score"], color=INK)
        axis.legend(frameon=False, loc="lower right", labelcolor=INK, fontsize=8)
    return _save(figure, folder / "limit.png")


def draw_curves(payload: Mapping[str, Any], folder: Path) -> Path | None:
    """Draws up to eight groups' means by phase with their intervals over seeds, one panel per
    metric. None if there are no curves."""
    metrics = [(side, name) for side, name in CURVES if name in payload["metrics"][side]]
    if not metrics:
        return None
    groups = choose_groups(payload)
    rows = math.ceil(len(metrics) / 2)
    figure, panels = _make_panels(len(metrics), columns=2, size=(10.0, 0.8 + 2.3 * rows))
    colors = _colors(payload)
    for axis, (side, name) in zip(panels, metrics, strict=False):
        for group in groups:
            curves = group["curves"][side]
            if name not in curves:
                continue
            mean, low, high = (np.array(curves[name][end], dtype=float) for end in ENDS)
            mark, color = "o-" if side == "eval" else "-", colors[group["id"]]
            axis.plot(curves["phase"], mean, mark, label=_label(group), markersize=4,
                      color=color, linewidth=1.2)  # fmt: skip
            axis.fill_between(curves["phase"], low, high, color=color, alpha=0.18, linewidth=0)
        axis.set_title(name, loc="left", color=INK, fontsize=9)
    figure.suptitle(f"lines: means over seeds; bands: {INTERVALS}", color=INK, fontsize=9)
    _legend_below(figure, panels)
    return _save(figure, folder / "curves.png")


def draw_costs(payload: Mapping[str, Any], folder: Path) -> Path | None:
    """Draws the means of the score's evaluations against the tokens sampled and the seconds so far,
    of up to eight groups. None if fewer than two groups know either."""
    side = "eval" if payload["score"] in payload["metrics"]["eval"] else "train"
    chosen, score = choose_groups(payload), payload["score"]
    known = {
        cost: [group for group in chosen if {cost, score} <= group["curves"][side].keys()]
        for cost in COST_NAMES
    }
    drawn = {cost: groups for cost, groups in known.items() if len(groups) > 1}
    if not drawn:
        return None
    figure, panels = _make_panels(len(drawn), columns=2, size=(10.0, 3.6))
    colors = _colors(payload)
    for axis, (cost, groups) in zip(panels, drawn.items(), strict=True):
        for group in groups:
            curves = group["curves"][side]
            x, mean, low, high = (
                np.array(column, dtype=float)
                for column in (curves[cost], *(curves[score][end] for end in ENDS))
            )
            color = colors[group["id"]]
            axis.plot(x, mean, "o-", label=_label(group), markersize=4, color=color, linewidth=1.2)
            axis.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        axis.set_xlabel(COST_NAMES[cost], color=INK)
    panels[0].set_ylabel(score, color=INK)
    figure.suptitle(f"lines: means over seeds of score and cost; bands: {INTERVALS}", color=INK,
                    fontsize=9)  # fmt: skip
    _legend_below(figure, panels)
    return _save(figure, folder / "costs.png")


def draw_parameters(payload: Mapping[str, Any], folder: Path) -> Path | None:
    """Draws each run's final score against the parameters, at most nine, most important first. None
    if there is no parameter or no score."""
    runs = [run for run in payload["runs"] if run["final"]["score"] is not None]
    shares = {entry["parameter"]: entry["share"] for entry in payload["importance"]}
    parameters = sorted(payload["parameters"], key=lambda name: -shares.get(name, 0))[:9]
    if not runs or not parameters:
        return None
    columns = min(3, len(parameters))
    size = (max(5.0, 3.6 * columns), 0.5 + 2.8 * math.ceil(len(parameters) / columns))
    figure, panels = _make_panels(len(parameters), columns=columns, size=size)
    names = short_names(payload["parameters"])
    for axis, name in zip(panels, parameters, strict=False):
        done = [run["status"] == "done" for run in runs]
        xs = _places(axis, [run["parameters"].get(name) for run in runs])
        ys = [run["final"]["score"] for run in runs]
        for is_done, face, alpha in ((True, SCORE, 0.6), (False, "none", 1.0)):
            points = [(x, y) for x, y, d in zip(xs, ys, done, strict=True) if d == is_done]
            if points:
                axis.scatter(*zip(*points, strict=True), s=22, facecolors=face, edgecolors=SCORE,
                             alpha=alpha, linewidths=0.8)  # fmt: skip
        share = f"  ({shares[name]:.0%})" if name in shares else ""
        axis.set_title(f"{_escape_dollars(names[name])}{share}", loc="left", color=INK, fontsize=9)
    for axis in panels[::columns]:
        axis.set_ylabel(payload["score"], color=INK)
    return _save(figure, folder / "parameters.png")


def choose_groups(payload: Mapping[str, Any], count: int = len(COLORS)) -> list[dict[str, Any]]:
    """Up to `count` groups in their order. If there are more: the groups on the front, evenly
    spaced along it if they are too many, then those with the best scores."""
    groups = list(payload["groups"])
    if len(groups) <= count:
        return groups
    front = pareto_groups(payload)
    others = [group for group in best_first(groups) if not group["pareto"]]
    if len(front) > count:
        front = [front[round(i * (len(front) - 1) / (count - 1))] for i in range(count)]
    chosen_ids = {group["id"] for group in [*front, *others][:count]}
    return [group for group in groups if group["id"] in chosen_ids]


def _places(axis: Any, values: Sequence[Any]) -> list[float]:
    """The positions on the x axis: the values, or a tick for each if some are not numbers."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        if min(values) > 0 and max(values) / min(values) >= MIN_LOG_RATIO:
            axis.set_xscale("log")
        numbers = sorted(set(values))
        if len(numbers) <= MAX_TICKS:
            axis.set_xticks(numbers, [f"{number:.4g}" for number in numbers])
            axis.set_xticks([], minor=True)
        return [float(value) for value in values]
    words = [show_value(value, limit=18) for value in values]
    order = sorted(set(words))
    axis.set_xticks(
        range(len(order)), [_escape_dollars(word) for word in order], rotation=20, ha="right"
    )
    return [float(order.index(word)) for word in words]


def _colors(payload: Mapping[str, Any]) -> dict[int, str]:
    """A color for each group: distinct for the up to eight chosen ones, gray for the others."""
    chosen_ids = [group["id"] for group in choose_groups(payload)]
    colors = {group["id"]: MUTED for group in payload["groups"]}
    return colors | dict(zip(chosen_ids, COLORS, strict=False))


def _label(group: Mapping[str, Any]) -> str:
    text = _escape_dollars(group["label"])
    return text if len(text) <= 60 else f"{text[:59]}…"


def _escape_dollars(text: str) -> str:
    # Matplotlib reads text between dollar signs as a formula.
    return text.replace("$", r"\$")


def _error(interval: Mapping[str, float | None]) -> list[list[float]] | None:
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    if mean is None or low is None or high is None:
        return None
    # Separate rounding may put an end on the wrong side of the mean.
    return [[max(0.0, mean - low)], [max(0.0, high - mean)]]


def _make_panels(count: int, *, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    rows = math.ceil(count / columns)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=MUTED)
    return figure, axes[:count]


def _legend_below(figure: Any, panels: Sequence[Any]) -> None:
    """Adds one legend for all panels, one entry per label, in as many columns as fit."""
    handles = {
        label: handle
        for axis in panels
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    longest = max((len(label) for label in handles), default=0)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        frameon=False,
        ncols=4 if longest < 20 else 3 if longest < 32 else 2,
        fontsize=8 if longest < 45 else 7,
        labelcolor=INK,
    )


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path

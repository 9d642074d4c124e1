"""Summaries of metrics and samples for people to read; training does not use them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NUM_BINS = 64
TAIL = 0.005  # the share of the values outside the equal bins, on each side


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """The number of values in each bin. Bin i is edges[i] to edges[i + 1]; the last is closed."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]


def histogram(values: Float[Tensor, " token"], *, num_bins: int = NUM_BINS) -> Histogram:
    """The histogram of the finite values: equal bins from their 0.5 % to their 99.5 % quantile (the
    nearest values). The first and the last bin are widened to the minimum and the maximum, so that
    outliers do not squeeze all other values into one bin. If the quantiles are equal, the bins
    divide minimum to maximum equally; if all values are equal, a width of 1 around them."""
    values = values.float().cpu()
    # In float64 the edges between two neighboring numbers differ.
    ordered = values[values.isfinite()].double().sort().values
    edges = torch.linspace(*_core(ordered), num_bins + 1, dtype=torch.float64)
    if len(ordered):
        edges[0] = torch.minimum(edges[0], ordered[0])
        edges[-1] = torch.maximum(edges[-1], ordered[-1])
    counts, _ = torch.histogram(ordered, bins=edges)
    return Histogram(counts=tuple(counts.long().tolist()), edges=tuple(edges.tolist()))


def _core(ordered: Float[Tensor, " token"]) -> tuple[float, float]:
    """The ends of the range with most of the values in rising order: two different numbers."""
    if not len(ordered):
        return 0.0, 1.0
    tail = round(TAIL * (len(ordered) - 1))
    for cut in (tail, 0):
        low, high = ordered[cut].item(), ordered[-1 - cut].item()
        if low < high:
            return low, high
    # At 1e20 adding 0.5 gives the same float.
    half = max(0.5, 1e-6 * abs(low))
    return low - half, low + half


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """A run's summary from the rows of its metrics.jsonl: the score and phase of the best
    evaluation (the first of equals), and all numbers of the last. Empty without evaluations."""
    evaluated = [row for row in rows if row.get("eval/score") is not None]
    if not evaluated:
        return {}
    best, last = max(evaluated, key=lambda row: row["eval/score"]), evaluated[-1]
    return {
        "best/eval_score": best["eval/score"],
        "best/phase": best["phase"],
        **{
            f"final/{name.replace('/', '_')}": value
            for name, value in last.items()
            if name.startswith("eval/") and value is not None
        },
    }


def describe(metrics: Mapping[str, float | None]) -> str:
    """The metrics as one line. None stands for a number that is not finite."""
    return "  ".join(f"{name} {show_number(value)}" for name, value in metrics.items())


def show_number(value: float | None) -> str:
    """A metric for people, with three decimals; in scientific notation from 1e9 on."""
    if value is None:
        return "not finite"
    # An exact KL of 0 may come out as -1e-8; + 0.0 takes the sign off the rounded one.
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 1e9 else f"{value:.3e}"

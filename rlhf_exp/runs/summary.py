"""Numbers computed from samples for people to read; nothing is trained on them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_exp.functional.masking import masked_mean, masked_var
from rlhf_exp.types import Experience

NUM_BINS = 64
TAIL = 0.005  # the share of the values that lie beyond the equal bins, on each side


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many values lie in each bin; bin i is edges[i] to edges[i + 1], the last closed."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]


def histogram(values: Float[Tensor, " token"], *, num_bins: int = NUM_BINS) -> Histogram:
    """The histogram of the finite values: equal bins from their 0.5 % to their 99.5 % quantile (the
    nearest values), of which the first and the last are widened to the least and the greatest, so
    that an outlier does not squeeze all others into one bin. If the quantiles are equal, the bins
    are equal from the least to the greatest; around a single value they are 1 wide together."""
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
    """Where most of the values in rising order lie: two different numbers."""
    if not len(ordered):
        return 0.0, 1.0
    tail = round(TAIL * (len(ordered) - 1))
    for cut in (tail, 0):
        low, high = ordered[cut].item(), ordered[-1 - cut].item()
        if low < high:
            return low, high
    # Beside 1e20 an edge that is 0.5 away would be no other number.
    half = max(0.5, 1e-6 * abs(low))
    return low - half, low + half


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """What a run came to, from the rows of its metrics.jsonl: the evaluation with the best score,
    the first of equals, and all numbers of the last one. Empty before the first evaluation."""
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
    """The metrics as one line. None is what files hold for a number that was not finite."""
    return "  ".join(f"{name} {show_number(value)}" for name, value in metrics.items())


def show_number(value: float | None) -> str:
    """A metric for people, with three decimals; in scientific notation from 1e9 on."""
    if value is None:
        return "not finite"
    # An exact KL of 0 may come out as -1e-8; + 0.0 takes the sign off the rounded one.
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 1e9 else f"{value:.3e}"


def distinct_n(tokens: Int[Tensor, "batch completion"], mask: Bool[Tensor, "batch completion"],
               *, n: int) -> float:  # fmt: skip
    """Distinct n-grams of tokens divided by all of them, over the whole batch; 0 if there are none.

    It falls with the number of samples, so compare it at equal numbers only.
    """
    grams = [
        tuple(row[i : i + n])
        for row, real in zip(tokens.tolist(), mask.sum(dim=1).tolist(), strict=True)
        for i in range(real - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def explained_variance(
    values: Float[Tensor, "batch completion"],
    returns: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is perfect, 0 no better than a
    constant. 0 if the returns do not vary."""
    variance = masked_var(returns, mask)
    if variance == 0:
        return 0.0
    return float(1 - masked_var(returns - values, mask) / variance)


def read_metrics(rows: Iterable[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """The numbers of rows that all have the same metrics, brought over from a GPU at once."""
    rows = list(rows)
    names = list(rows[0])
    numbers = torch.stack([torch.stack([row[name] for name in names]) for row in rows]).tolist()
    return [dict(zip(names, row, strict=True)) for row in numbers]


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over rows that all have the same ones."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def rollout_metrics(experience: Experience, *, truncates: bool) -> dict[str, float]:
    """What a rollout was like, before learning from it. KL is exact, of the policy that sampled."""
    rollout, mask = experience.rollout, experience.rollout.completions.mask
    metrics = {
        "objective/scores": rollout.scores.mean().item(),
        "objective/scores_std": rollout.scores.std(correction=0).item(),
        "objective/kl": masked_mean(rollout.kl, mask).item(),
        "objective/kl_sum": rollout.kl.sum(dim=1).mean().item(),
        "objective/entropy": masked_mean(rollout.entropy, mask).item(),
        "sample/len_mean": mask.sum(dim=1).float().mean().item(),
        "sample/distinct_3": distinct_n(rollout.completions.tokens, mask, n=3),
    }
    if rollout.values is not None and experience.returns is not None:
        explained = explained_variance(rollout.values, experience.returns, mask)
        metrics["val/explained_variance"] = explained
    if truncates:
        metrics["sample/kept_mass"] = masked_mean(rollout.kept_mass, mask).item()
    return metrics

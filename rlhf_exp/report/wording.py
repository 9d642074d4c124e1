"""Numbers, intervals and other wording that Markdown and terminal share."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_exp.security.printable import printable

LINE_ENDS = re.compile("\r\n|[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")

INTERVALS = "95 % t-intervals of the mean"  # on page, Markdown and terminal
BOOTSTRAP = "95 % percentile intervals of a bootstrap over seeds"
COST_NAMES = {
    "tokens": "tokens sampled for training",
    "seconds": "seconds of training, without evaluations",
}


def show_number(value: float | None) -> str:
    """The number with four digits, 0 for a rounding error around 0; "-" if it is unknown."""
    return "-" if value is None else f"{value if abs(value) > 1e-7 else 0:.4g}"


def show_count(value: float | None) -> str:
    """The number as "6,144" from 1000 on, else as `show_number`."""
    return f"{value:,.0f}" if value is not None and value >= 1000 else show_number(value)


def show_interval(interval: Mapping[str, float | None]) -> str:
    """The interval as "0.97 [0.96, 0.98]"; only the mean if there is no interval."""
    if interval["low"] is None or interval["high"] is None:
        return show_number(interval["mean"])
    mean, low, high = (f"{interval[end]:.3g}" for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def one_line(text: str) -> str:
    """The text with its line ends as arrows, and without characters that control a terminal or
    hide or reverse other text."""
    return printable(LINE_ENDS.sub(" ↵ ", text))


def pareto_groups(payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups on the Pareto front, the lowest KL first."""
    front = [group for group in payload["groups"] if group["pareto"]]
    return sorted(front, key=lambda group: group["kl"]["mean"])


def best_first(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The groups on the front, then the others; both by mean score, missing ones last."""
    return sorted(groups, key=lambda g: (not g["pareto"], *score_rank(g["score"]["mean"])))


def score_rank(score: float | None) -> tuple[bool, float]:
    """A key that sorts high scores first and missing ones last."""
    return score is None, -(score or 0.0)


def count_statuses(payload: Mapping[str, Any]) -> str:
    """The number of runs by status, as "11 done, 1 failed"."""
    counts = Counter(run["status"] for run in payload["runs"])
    return ", ".join(f"{count} {status}" for status, count in counts.items())

"""The report in a terminal: a table of the groups with the front marked, errors and warnings."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_exp.report.grouping import short_names, show_value
from rlhf_exp.report.wording import (
    INTERVALS,
    best_first,
    count_statuses,
    one_line,
    show_interval,
)

MAX_ROWS, MAX_LINES = 20, 8
MAX_COLUMNS = 4  # more parameters share one column


def print_report(payload: Mapping[str, Any], console: Console) -> None:
    """Prints the report's essentials as plain text, without interpreting markup."""
    console.print(
        _styled_line(f"{payload['title']} ({count_statuses(payload) or 'none'})", style="bold")
    )
    if payload["groups"]:
        console.print(_groups(payload))
        if any(group["pareto"] for group in payload["groups"]):
            several = any(group["score"]["low"] is not None for group in payload["groups"])
            brackets = f"; in brackets {INTERVALS}" if several else ""
            console.print(Text(f"* on the Pareto front{brackets}", style="dim"))
    if payload["importance"]:
        console.print(_importance(payload))
    elif payload["parameters"]:
        console.print(Text(payload["importance_note"], style="dim"))
    failed = [f"{run['name']}: {run['error']}" for run in payload["runs"] if run["error"]]
    _print_lines("errors", failed, console, style="red")
    warnings = [f"{run['name']}: {w}" for run in payload["runs"] for w in run["warnings"]]
    _print_lines("warnings", warnings, console, style="yellow")
    _print_lines("left out or not read", payload["problems"], console, style="yellow")


def _styled_line(text: str, style: str = "") -> Text:
    return Text(one_line(text), style=style)


def _groups(payload: Mapping[str, Any]) -> Table:
    groups = best_first(payload["groups"])
    left = len(groups) - MAX_ROWS
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # two columns more would not fit 80 beside three parameters
        caption=Text(f"... and {left} more") if left > 0 else None,
        caption_justify="left",
    )
    table.add_column("", width=1)
    names = short_names(payload["parameters"])
    apart = 0 < len(names) <= MAX_COLUMNS
    for name in names.values() if apart else ["parameters"]:
        table.add_column(_styled_line(name), overflow="fold")
    table.add_column("runs", justify="right")
    table.add_column(_styled_line(payload["score"]), justify="right", no_wrap=True)
    table.add_column(_styled_line(payload["kl"]), justify="right", no_wrap=True)
    for group in groups[:MAX_ROWS]:
        split = apart and group["parameters"]
        cells = [show_value(group["parameters"][name], limit=24) for name in names] if split else [
            group["label"], *[""] * (len(names) - 1 if apart else 0)
        ]  # fmt: skip
        table.add_row(
            "*" if group["pareto"] else "",
            *map(_styled_line, cells),
            str(len(group["runs"])),
            Text(show_interval(group["score"])),
            Text(show_interval(group["kl"])),
            style="bold" if group["pareto"] else None,
        )
    return table


def _importance(payload: Mapping[str, Any]) -> Text:
    names = short_names(payload["parameters"])
    parts = [f"{names[e['parameter']]} {e['share']:.0%}" for e in payload["importance"][:6]]
    pairs = [
        f"{' x '.join(names[name] for name in e['parameters'])} {e['share']:.0%}"
        for e in payload["interactions"][:3]
        if e["share"] >= 0.01
    ]
    noise = f"noise {payload['importance_noise']:.0%}"
    return _styled_line(f"variance of the score: {', '.join([*parts, *pairs, noise])}")


def _print_lines(title: str, lines: list[str], console: Console, *, style: str) -> None:
    if not lines:
        return
    console.print(Text(f"{title}:", style=style))
    for line in lines[:MAX_LINES]:
        console.print(_styled_line(f"  {line}"), soft_wrap=False)
    if len(lines) > MAX_LINES:
        console.print(Text(f"  ... and {len(lines) - MAX_LINES} more"))

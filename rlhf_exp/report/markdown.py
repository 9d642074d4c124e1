"""The report as Markdown with pictures beside it, for a pull request or a notebook of experiments.

Text from a model or a configuration is escaped, so that it stays plain text in one cell.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.report.grouping import show_value
from rlhf_exp.report.wording import (
    INTERVALS,
    best_first,
    count_statuses,
    one_line,
    pareto_groups,
    score_rank,
    show_interval,
    show_number,
)

MAX_ROWS = 30  # in a table, and in the list of warnings
MAX_SAMPLED_RUNS = 3
MAX_CELL = 500  # characters
SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$^-])")


def write_markdown(payload: Mapping[str, Any], pictures: Sequence[Path], path: Path) -> Path:
    """Writes the report into the folder of the pictures."""
    names = {picture.name for picture in pictures}
    parts = [
        f"# {escape(payload['title'])}",
        f"{payload['made']}, from {_listed(payload['sources'])}. {count_statuses(payload)}.",
        *_headline(payload),
        *_picture("frontier.png", "score against KL", names),
        *_groups(payload),
        *_picture("curves.png", f"means over seeds with {INTERVALS}", names),
        *_parameters(payload, names),
        *_runs(payload),
        *_warnings(payload),
        *_samples(payload),
        *_configuration(payload),
        *_problems(payload),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def escape(text: str, *, limit: int = MAX_CELL) -> str:
    """The text as one line without markup, HTML, links, formulas or the end of a cell."""
    text = text if len(text) <= limit else f"{text[:limit]}…"
    text = html.escape(one_line(text), quote=False)
    text = SPECIAL.sub(r"\\\1", text.replace("\t", " "))
    # Bare addresses become links too.
    text = text.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")
    return re.sub(r"^(\s*\d+)\. ", r"\1\\. ", text).strip()


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(escape(text) for text in texts)


def _picture(name: str, description: str, names: set[str]) -> list[str]:
    return [f"![{description}]({name})"] if name in names else []


def _headline(payload: Mapping[str, Any]) -> list[str]:
    front = pareto_groups(payload)
    if not front:
        return []
    lines = [
        f"- **{escape(group['label'])}**: {escape(payload['score'])}"
        f" {escape(show_interval(group['score']))} at {escape(payload['kl'])}"
        f" {escape(show_interval(group['kl']))}"
        for group in front[:MAX_ROWS]
    ]
    lead = (
        "Best trade-offs (no other has both a higher score and a lower KL; means over seeds, in"
        f" brackets {INTERVALS}):"
    )
    return [lead, "\n".join(lines)]


def _groups(payload: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            escape(group["label"]),
            str(len(group["runs"])),
            show_interval(group["score"]),
            show_interval(group["kl"]),
            "yes" if group["pareto"] else "",
        ]
        for group in best_first(payload["groups"])
    ]
    if len(rows) < 2:
        return []
    head = ["parameters", "runs", escape(payload["score"]), escape(payload["kl"]), "on the front"]
    return [
        "## By parameters",
        f"Means over seeds, in brackets {INTERVALS}.",
        *_table(head, rows, ":--:"),
    ]


def _parameters(payload: Mapping[str, Any], names: set[str]) -> list[str]:
    if not payload["parameters"]:
        return []
    rows = [
        [escape(entry["parameter"]), f"{entry['share']:.1%}"] for entry in payload["importance"]
    ]
    rows += [
        [" x ".join(escape(name) for name in entry["parameters"]), f"{entry['share']:.1%}"]
        for entry in payload["interactions"]
        if entry["share"] >= 0.001
    ]
    table = _table(["parameter", "share of the variance"], rows, "--:") if rows else []
    return [
        "## Parameters",
        *_picture("parameters.png", "final score against each parameter", names),
        *table,
        escape(payload["importance_note"], limit=2000),
    ]


def _runs(payload: Mapping[str, Any]) -> list[str]:
    rows = []
    for run in sorted(payload["runs"], key=lambda run: score_rank(run["final"]["score"])):
        final = run["final"]
        status = run["status"] + (f": {run['error']}" if run["error"] else "")
        names = ("score", "best_score", "kl", "entropy", "distinct_3", "seconds")
        numbers = [show_number(final[name]) for name in names]
        warnings = str(len(run["warnings"]) or "")
        name = escape(run["name"])
        rows.append([name, escape(status, limit=120), str(run["phases"]), *numbers, warnings])
    head = ["run", "status", "phases", "score", "best", "KL", "entropy", "distinct-3", "seconds"]
    return ["## Runs", *_table([*head, "warnings"], rows, "--:")] if rows else []


def _warnings(payload: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- **{escape(run['name'])}**: {escape(warning)}"
        for run in payload["runs"]
        for warning in run["warnings"]
    ]
    left = len(lines) - MAX_ROWS
    more = [f"- ... and {left} more in report.html"] if left > 0 else []
    return ["## Warnings", "\n".join([*lines[:MAX_ROWS], *more])] if lines else []


def _samples(payload: Mapping[str, Any]) -> list[str]:
    """The samples of the best run of each group on the front, or else of the best runs."""
    runs = [run for run in payload["runs"] if run["samples"]]
    runs.sort(key=lambda run: score_rank(run["final"]["score"]))
    front = {group["id"] for group in pareto_groups(payload)}
    firsts = {run["group"]: run for run in reversed(runs) if run["group"] in front}
    parts = []
    for run in (list(firsts.values())[::-1] or runs)[:MAX_SAMPLED_RUNS]:
        rows = [
            [
                escape(sample["prompt"]),
                show_number(sample["score_before"]),
                escape(sample["before"]),
                show_number(sample["score_after"]),
                escape(sample["after"] or ""),
            ]
            for sample in run["samples"]
        ]
        head = ["prompt", "score", "before", "score", "after"]
        parts += [f"### {escape(run['name'])}", *_table(head, rows, "---")]
    return ["## Samples, first and last evaluation", *parts] if parts else []


def _configuration(payload: Mapping[str, Any]) -> list[str]:
    rows = [[escape(key), _values(values)] for key, values in payload["differing"].items()]
    table = _table(["key", "values"], rows, "---") if rows else []
    lines = [f"{json.dumps(k)[1:-1]}: {json.dumps(v)}" for k, v in payload["common"].items()]
    folded = [
        "<details><summary>Configuration that all runs share</summary>",
        "```yaml\n" + "\n".join(lines) + "\n```",
        "</details>",
    ]
    return ["## Configuration", *table, *(folded if lines else [])]


def _values(values: Sequence[Any]) -> str:
    different = list(dict.fromkeys(show_value(value) for value in values))
    listing = ", ".join(escape(value) for value in different[:8])
    return listing if len(different) <= 8 else f"{listing} and {len(different) - 8} more"


def _problems(payload: Mapping[str, Any]) -> list[str]:
    lines = [f"- {escape(problem)}" for problem in payload["problems"]]
    return ["## What could not be read or was left out", "\n".join(lines)] if lines else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], rule: str) -> list[str]:
    """A table of escaped cells, with all columns but the first aligned by the rule; then a line
    with the number of rows left out."""
    lines = [head, ["---", *[rule] * (len(head) - 1)], *rows[:MAX_ROWS]]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    left = len(rows) - MAX_ROWS
    return [text, f"... and {left} more in report.html"] if left > 0 else [text]

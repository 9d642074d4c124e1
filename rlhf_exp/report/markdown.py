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
    BOOTSTRAP,
    COST_NAMES,
    INTERVALS,
    best_first,
    count_statuses,
    one_line,
    pareto_groups,
    score_rank,
    show_count,
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
        *_picture("true_reward.png", "true reward against KL", names),
        *_groups(payload),
        *_improvements(payload),
        *_equal_costs(payload, names),
        *_kl_estimates(payload),
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
    groups = best_first(payload["groups"])
    if len(groups) < 2:
        return []
    columns: dict[str, list[str]] = {
        "parameters": [escape(group["label"]) for group in groups],
        "runs": [str(len(group["runs"])) for group in groups],
        escape(payload["score"]): [show_interval(group["score"]) for group in groups],
        escape(payload["kl"]): [show_interval(group["kl"]) for group in groups],
        "on the front": ["yes" if group["pareto"] else "" for group in groups],
    }
    note = f"Means over seeds, in brackets {INTERVALS}."
    if any(group["iqm"] for group in groups):
        columns["IQM"] = [show_interval(g["iqm"]) if g["iqm"] else "" for g in groups]
        note += (
            " IQM: the interquartile mean of the score, of groups of at least five runs, in"
            f" brackets {BOOTSTRAP}."
        )
    if any(group["efficiency"] for group in groups):
        columns["KL efficiency"] = [
            show_interval(g["efficiency"]) if g["efficiency"] else "" for g in groups
        ]
        note += " KL efficiency: the least KL of a policy with that score, divided by the run's KL."
    if true_reward := payload["true_reward"]:
        name = escape(true_reward["score"])
        columns[name] = [show_interval(group["true_reward"]["score"]) for group in groups]
    if before := payload["before"]:
        places = [
            f"{escape(payload[name])} {escape(show_interval(before[name]))}"
            for name in ("score", "kl")
        ]
        note += f" Before training, the model that all of these begin from: {', '.join(places)}."
    rows = [*map(list, zip(*columns.values(), strict=True))]
    return ["## By parameters", note, *_table([*columns], rows, ":--:")]


def _improvements(payload: Mapping[str, Any]) -> list[str]:
    pairs = payload["improvements"]
    rows = [
        [escape(pair["first"]), escape(pair["second"]), show_interval(pair["probability"])]
        for pair in pairs
    ]
    if not rows:
        return []
    note = (
        f"The probability that a run of the first has a higher {escape(payload['score'])} than a"
        f" run of the second, ties counting one half; in brackets {BOOTSTRAP}, where both have at"
        " least five seeds. 1 \\[1, 1\\] says that these runs do not overlap, not that others will"
        " not."
    )
    if any(pair["strata"] > 1 for pair in pairs):
        note += " Means over tasks and rewards, within each of which the seeds are resampled."
    table = _table(["first", "second", "probability"], rows, ":--:")
    return ["## Probability of improvement", note, *table]


def _equal_costs(payload: Mapping[str, Any], names: set[str]) -> list[str]:
    if not payload["equal_cost"]:
        return []
    labels = [escape(group["label"]) for group in payload["groups"]]
    parts = [
        "## At equal samples and in equal time",
        "Each run by its last evaluation before the largest cost that all of these runs reach, or"
        f" at most 5 % beyond; means over seeds, in brackets {INTERVALS}. A setting is left out if"
        " its cost is not known or a run has no evaluation by then.",
        *_picture("costs.png", "score against tokens and seconds", names),
    ]
    for entry in payload["equal_cost"]:
        cost = entry["cost"]
        ranked = sorted(entry["groups"], key=lambda group: score_rank(group["score"]["mean"]))
        rows = [
            [
                labels[group["group"]],
                show_interval(group["score"]),
                show_interval(group["kl"]),
                show_count(group["spent"]),
            ]
            for group in ranked
        ]
        left_out = ", ".join(labels[number] for number in entry["left_out"])
        note = f"At {show_count(entry['budget'])} {COST_NAMES[cost]}:"
        parts.append(f"{note} (left out: {left_out})" if left_out else note)
        head = ["parameters", escape(payload["score"]), escape(payload["kl"]), f"{cost} so far"]
        parts += _table(head, rows, ":--:")
    return parts


def _kl_estimates(payload: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            escape(payload["groups"][entry["group"]]["label"]),
            show_number(entry["kl"]),
            *(
                f"{show_number(entry[f'kl_{k}'])} ({show_number(entry[f'kl_{k}_var'])})"
                for k in ("k1", "k2", "k3")
            ),
        ]
        for entry in payload["kl_estimates"]
    ]
    if not rows:
        return []
    return [
        "## Estimates of the KL",
        "Of the rollouts, in nats a token: the exact KL and its estimates from the sampled tokens,"
        " in parentheses their variances over tokens; means over phases and seeds.",
        *_table(["parameters", "exact", "k1", "k2", "k3"], rows, "--:"),
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

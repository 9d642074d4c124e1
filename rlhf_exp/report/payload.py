"""The content of a report, as one JSON-able dict that page, Markdown and terminal share.

It knows what to show, not how it looks. Numbers have four significant digits.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.report.diagnosis import diagnose
from rlhf_exp.report.grouping import (
    Group,
    group_runs,
    repeated,
    settings_of,
    split_configs,
    varied_parameters,
)
from rlhf_exp.report.importance import Importance, measure_importance
from rlhf_exp.report.statistics import mean_interval, pareto_front
from rlhf_exp.runs.config_keys import BEST_OF_N
from rlhf_exp.runs.reading import Curves, Run, read_runs
from rlhf_exp.runs.samples import Sample, encodable

MAX_NUMBERS = 1_000_000  # in curves: 7 MB of JSON beside Plotly's 5 in a page of 15
MAX_TEXT_BYTES = 2_000_000  # for all samples as JSON
MAX_TEXT = 2000  # characters of a prompt or a completion


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of the frontier's two metrics."""

    score: str = "eval/score"
    kl: str = "eval/kl"


def build_payload(paths: Sequence[Path], names: Names, *, made: datetime) -> dict[str, Any]:
    """The report of the runs at and below the paths.

    The frontier, the groups' means and the importances use only runs that are done; if none is, all
    runs with an evaluation after phase 0. "runs" lists all runs.
    """
    runs, problems = read_runs(paths)
    parameters = varied_parameters(runs)
    groups = group_runs(runs, parameters)
    counted, remarks = _counted(runs, names)
    problems += remarks + repeated(runs, groups) + _commits(runs)
    metrics, phases = _choose_curves(runs, groups, problems)
    common, differing = split_configs(runs)
    importance = _importance(runs, counted, parameters, names)
    text_limit = _text_limit(runs)
    return {
        "title": _title(runs, paths),
        "made": made.strftime("%Y-%m-%d %H:%M"),
        "sources": [encodable(str(path)) for path in paths],
        "score": names.score,
        "kl": names.kl,
        "parameters": parameters,
        "metrics": metrics,
        "runs": [
            {
                **_describe_run(run, index, groups, parameters, names),
                "curves": _run_curves(run, metrics, phases),
                "samples": [_clipped(sample, text_limit) for sample in run.samples],
            }
            for index, run in enumerate(runs)
        ],
        "groups": _describe_groups(runs, groups, counted, names, metrics, phases),
        "importance": [
            {"parameter": name, "share": rounded(share)} for name, share in importance.parameters
        ],
        "interactions": [
            {"parameters": [a, b], "share": rounded(share)} for a, b, share in importance.pairs
        ],
        "importance_noise": rounded(importance.noise),
        "importance_note": importance.note,
        "common": common,
        "differing": differing,
        "problems": problems,
    }


def rounded(value: float | None) -> float | None:
    """The number with four significant digits; None if it is unknown or not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _rounded_all(values: np.ndarray) -> list[float | None]:
    return [rounded(value) for value in values.tolist()]


def _title(runs: Sequence[Run], paths: Sequence[Path]) -> str:
    names = {str(run.config["name"]) for run in runs if "name" in run.config}
    name = (
        names.pop()
        if len(names) == 1
        else ", ".join(encodable(path.resolve().name) for path in paths)
    )
    return f"{name}: {len(runs)} run{'' if len(runs) == 1 else 's'}"


def _commits(runs: Sequence[Run]) -> list[str]:
    """A line if the runs come from different commits."""
    counts = Counter(commit for run in runs for commit in run.commits)
    if len(counts) < 2:
        return []
    listing = ", ".join(
        f"{commit[:7]}{'+' if commit.endswith('+') else ''} ({count} run{'s' * (count > 1)})"
        for commit, count in counts.items()
    )
    return [f"the runs come from different commits, so the code may explain differences: {listing}"]


def _counted(runs: Sequence[Run], names: Names) -> tuple[set[int], list[str]]:
    """The indices of the runs that the means use, and remarks about the others."""
    scored = {index for index, run in enumerate(runs) if run.final(names.score) is not None}
    done = {index for index in scored if runs[index].status == "done"}
    remarks = []
    if not runs:
        return set(), []
    if not scored:
        have = sorted({n for run in runs for n in run.evaluated.values if n.startswith("heldout/")})
        hint = f"; they have {', '.join(have)}: name one with --score" if have else ""
        remarks.append(f"frontier: no run has {names.score} after its phase 0{hint}")
    elif not done:
        remarks.append("frontier: no run is done; it shows each run's last evaluation so far")
    elif len(scored) > len(done):
        count = len(scored) - len(done)
        which = "1 run that is" if count == 1 else f"{count} runs that are"
        remarks.append(f"frontier: {which} not done left out of means, front and importances")
    return done or scored, remarks


def _choose_curves(
    runs: Sequence[Run], groups: Sequence[Group], problems: list[str]
) -> tuple[dict[str, list[str]], set[int] | None]:
    """The metrics to draw as curves, and the phases to which training curves are thinned (None:
    all) to keep a page of many runs small."""
    train = list(dict.fromkeys(name for run in runs for name in run.train.values))
    evaluated = list(dict.fromkeys(name for run in runs for name in run.evaluated.values))
    metrics = {"train": train, "eval": evaluated}
    copies = len(runs) + 3 * len(groups)
    longest = max((len(run.train.phases) for run in runs), default=0)
    stride = math.ceil(len(train) * longest * copies / MAX_NUMBERS)
    if stride <= 1:
        return metrics, None
    problems.append(f"curves: one phase in {stride}, to keep the report small")
    phases = sorted({phase for run in runs for phase in run.train.phases})
    return metrics, {*phases[::stride], *(run.train.phases[-1] for run in runs if run.train.phases)}


def _describe_run(
    run: Run, index: int, groups: Sequence[Group], parameters: Sequence[str], names: Names
) -> dict[str, Any]:
    best = [value for _, value in run.curves(names.score).points(names.score)]
    final = {
        "score": run.final(names.score),
        "kl": run.final(names.kl),
        "entropy": _last(run, "eval/entropy", "objective/entropy"),
        "distinct_3": _last(run, "eval/distinct_3", "sample/distinct_3"),
        "best_score": max(best, default=None),
        "seconds": run.seconds,
    }
    return {
        "id": index,
        "name": run.name,
        "folder": encodable(str(run.folder)),
        "status": run.status,
        "error": run.error,
        "seed": run.seed,
        "group": next(g for g, group in enumerate(groups) if index in group.runs),
        "parameters": settings_of(run, parameters),
        "phases": max([0, *run.train.phases[-1:], *run.evaluated.phases[-1:]]),
        "final": {name: rounded(value) for name, value in final.items()},
        "warnings": diagnose(run),
    }


def _last(run: Run, evaluated: str, trained: str) -> float | None:
    """The last number of an evaluation metric, or else of the training metric."""
    value = run.evaluated.last(evaluated)
    return run.train.last(trained) if value is None else value


def _run_curves(
    run: Run, metrics: Mapping[str, Sequence[str]], thinned: set[int] | None
) -> dict[str, Any]:
    curves = {}
    for side, source in (("train", run.train), ("eval", run.evaluated)):
        phases = _thinned_phases(source.phases, thinned if side == "train" else None)
        table = _table([source], phases, [n for n in metrics[side] if n in source.values])
        columns = {name: _rounded_all(values[0]) for name, values in table.items()}
        curves[side] = {"phase": phases, **columns}
    return curves


def _thinned_phases(phases: Iterable[int], thinned: set[int] | None) -> list[int]:
    return sorted(p for p in set(phases) if thinned is None or p in thinned)


def _table(
    sources: Sequence[Curves], phases: Sequence[int], metrics: Sequence[str]
) -> dict[str, np.ndarray]:
    """An array for each metric, with a row per run and a column per phase; NaN for no value."""
    tables = {name: np.full((len(sources), len(phases)), math.nan) for name in metrics}
    for row, source in enumerate(sources):
        _, columns, places = np.intersect1d(phases, source.phases, return_indices=True)
        for name in source.values.keys() & tables.keys():
            tables[name][row, columns] = source.values[name][places]
    return tables


def _describe_groups(
    runs: Sequence[Run],
    groups: Sequence[Group],
    counted: set[int],
    names: Names,
    metrics: Mapping[str, Sequence[str]],
    thinned: set[int] | None,
) -> list[dict[str, Any]]:
    described: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        members = [runs[i] for i in group.runs if i in counted]
        described.append(
            {
                "id": index,
                "label": group.label,
                "parameters": group.parameters,
                "runs": group.runs,
                "score": _interval(members, names.score),
                "kl": _interval(members, names.kl),
                "path": _path(members, names),
                "path_axis": _path_axis(members),
                "curves": _group_curves(members or [runs[i] for i in group.runs], metrics, thinned),
            }
        )
    front = pareto_front([(group["kl"]["mean"], group["score"]["mean"]) for group in described])
    return [{**group, "pareto": on} for group, on in zip(described, front, strict=True)]


def _interval(runs: Sequence[Run], metric: str) -> dict[str, float | None]:
    values = [value for run in runs if (value := run.final(metric)) is not None]
    interval = mean_interval(np.array(values, dtype=float).reshape(-1, 1))
    return {end: rounded(float(array[0])) for end, array in interval._asdict().items()}


def _path(runs: Sequence[Run], names: Names) -> list[dict[str, Any]]:
    """The means of both metrics at each phase for which all runs of the group have them."""
    points = [
        (dict(r.curves(names.score).points(names.score)), dict(r.curves(names.kl).points(names.kl)))
        for r in runs
    ]
    if not points:
        return []
    phases = set.intersection(*(score.keys() & kl.keys() for score, kl in points))
    return [
        {
            "phase": phase,
            "score": rounded(float(np.mean([score[phase] for score, _ in points]))),
            "kl": rounded(float(np.mean([kl[phase] for _, kl in points]))),
        }
        for phase in sorted(phases)
    ]


def _path_axis(runs: Sequence[Run]) -> str:
    """What the phases of the path count: "n" for the best of n samples, else "phase"."""
    return "n" if {run.config.get("stage._target_") for run in runs} == {BEST_OF_N} else "phase"


def _group_curves(
    runs: Sequence[Run], metrics: Mapping[str, Sequence[str]], thinned: set[int] | None
) -> dict[str, Any]:
    curves = {}
    for side in ("train", "eval"):
        sources = [run.train if side == "train" else run.evaluated for run in runs]
        all_phases = (phase for source in sources for phase in source.phases)
        phases = _thinned_phases(all_phases, thinned if side == "train" else None)
        names = [n for n in metrics[side] if any(n in source.values for source in sources)]
        columns: dict[str, Any] = {"phase": phases}
        if names:
            tables = _table(sources, phases, names)
            interval = mean_interval(np.hstack([tables[name] for name in names]))
            ends = {end: np.split(a, len(names)) for end, a in interval._asdict().items()}
            for i, name in enumerate(names):
                columns[name] = {end: _rounded_all(parts[i]) for end, parts in ends.items()}
        curves[side] = columns
    return curves


def _importance(
    runs: Sequence[Run], counted: set[int], parameters: Sequence[str], names: Names
) -> Importance:
    configured = [runs[i] for i in sorted(counted) if runs[i].config]
    scores = [score for run in configured if (score := run.final(names.score)) is not None]
    settings = [settings_of(run, parameters) for run in configured]
    return measure_importance(settings, scores, parameters)


def _text_limit(runs: Sequence[Run]) -> int:
    """The number of characters to show of each text. All texts must fit into MAX_TEXT_BYTES of
    JSON, where many characters take six bytes."""
    samples = [sample for run in runs for sample in run.samples]
    texts = [text[:MAX_TEXT] for s in samples for text in (s.prompt, s.before, s.after) if text]
    escaped = sum(len(json.dumps(text)) for text in texts)
    if escaped <= MAX_TEXT_BYTES:
        return MAX_TEXT
    return int(MAX_TEXT_BYTES / len(texts) * sum(map(len, texts)) / escaped)


def _clipped(sample: Sample, limit: int) -> dict[str, Any]:
    """The sample with the end of a long prompt and the beginning of a long completion."""
    prompt = sample.prompt if len(sample.prompt) <= limit else f"…{sample.prompt[-limit:]}"
    before, after = (
        text if text is None or len(text) <= limit else f"{text[:limit]}…"
        for text in (sample.before, sample.after)
    )
    return {
        "prompt": prompt,
        "before": before,
        "after": after,
        "score_before": rounded(sample.score_before),
        "score_after": rounded(sample.score_after),
    }

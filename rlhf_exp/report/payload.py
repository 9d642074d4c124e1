"""The content of a report, as one JSON-able dict that page, Markdown and terminal share.

It knows what to show, not how it looks. Numbers have four significant digits.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf_exp.report.comparison import at_equal_cost, improvements, kl_estimates
from rlhf_exp.report.curve_tables import choose_curves, group_curves, run_curves
from rlhf_exp.report.diagnosis import diagnose
from rlhf_exp.report.frontier import (
    TRUE_REWARD,
    before_training,
    default_kl,
    interval,
    iqm,
    is_best_of_n,
    place_groups,
)
from rlhf_exp.report.grouping import (
    Group,
    group_runs,
    repeated,
    settings_of,
    split_configs,
    varied_parameters,
)
from rlhf_exp.report.importance import Importance, measure_importance
from rlhf_exp.report.limits import efficiency, limit_lines, mean_efficiency
from rlhf_exp.report.statistics import rounded
from rlhf_exp.runs.reading import Run, read_runs
from rlhf_exp.runs.samples import Sample, encodable

MAX_TEXT_BYTES = 2_000_000  # for all samples as JSON
MAX_TEXT = 2000  # characters of a prompt or a completion


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of the frontier's two metrics. A `kl` of None is eval/kl, or eval/kl_sum if there
    are runs of stage=best_of_n or with a limit."""

    score: str = "eval/score"
    kl: str | None = None


def build_payload(paths: Sequence[Path], names: Names, *, made: datetime) -> dict[str, Any]:
    """The report of the runs at and below the paths.

    The frontier, the groups' means and the importances use only runs that are done; if none is, all
    runs with an evaluation after phase 0. "runs" lists all runs.
    """
    runs, problems = read_runs(paths)
    kl = names.kl or default_kl(runs)
    parameters = varied_parameters(runs)
    groups = group_runs(runs, parameters)
    counted, remarks = _counted(runs, names)
    members = [[runs[i] for i in group.runs if i in counted] for group in groups]
    problems += remarks + repeated(runs, groups) + _commits(runs)
    metrics, phases = choose_curves(runs, groups, problems)
    common, differing = split_configs(runs)
    importance = _importance(runs, counted, parameters, names)
    text_limit = _text_limit(runs)
    described = _describe_groups(runs, groups, members, names.score, kl, metrics, phases)
    for group, place in zip(described, place_groups(members, names.score, kl), strict=True):
        group |= place
    true_reward = _true_reward(members, described, parameters, names.score, kl)
    return {
        "title": _title(runs, paths),
        "made": made.strftime("%Y-%m-%d %H:%M"),
        "sources": [encodable(str(path)) for path in paths],
        "score": names.score,
        "kl": kl,
        "parameters": parameters,
        "metrics": metrics,
        "runs": [
            {
                **_describe_run(run, index, groups, parameters, names.score, kl),
                "curves": run_curves(run, metrics, phases),
                "samples": [_clipped(sample, text_limit) for sample in run.samples],
            }
            for index, run in enumerate(runs)
        ],
        "groups": described,
        "before": before_training(members, names.score, kl),
        "limits": limit_lines(members, parameters, names.score, kl),
        "true_reward": true_reward,
        "improvements": improvements(groups, members, names.score),
        "equal_cost": [
            table
            for cost in ("tokens", "seconds")
            if (table := at_equal_cost(members, cost, names.score, kl))
        ],
        "kl_estimates": kl_estimates(described),
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


def _describe_run(
    run: Run, index: int, groups: Sequence[Group], parameters: Sequence[str], score: str, kl: str
) -> dict[str, Any]:
    best = [value for _, value in run.curves(score).points(score)]
    final = {
        "score": run.final(score),
        "true_reward": run.final(TRUE_REWARD),
        "kl": run.final(kl),
        "efficiency": efficiency(run),
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


def _describe_groups(
    runs: Sequence[Run],
    groups: Sequence[Group],
    members: Sequence[Sequence[Run]],
    score: str,
    kl: str,
    metrics: Mapping[str, Sequence[str]],
    thinned: set[int] | None,
) -> list[dict[str, Any]]:
    return [
        {
            "id": index,
            "label": group.label,
            "parameters": group.parameters,
            "runs": group.runs,
            "true_reward": None,
            "iqm": iqm(counted, score),
            "kl": interval(counted, kl),
            "efficiency": mean_efficiency(counted),
            "path_axis": "n" if counted and all(map(is_best_of_n, counted)) else "phase",
            "curves": group_curves(counted or [runs[i] for i in group.runs], metrics, thinned),
        }
        for index, (group, counted) in enumerate(zip(groups, members, strict=True))
    ]


def _true_reward(
    members: Sequence[Sequence[Run]],
    described: Sequence[dict[str, Any]],
    parameters: Sequence[str],
    score: str,
    kl: str,
) -> dict[str, Any] | None:
    """The metric, the point before training and the limits of a second frontier, of the true
    reward; gives each group its place on it. None if no run knows a true reward, or if it is the
    score."""
    known = any(run.final(TRUE_REWARD) is not None for runs in members for run in runs)
    if not known or score == TRUE_REWARD:
        return None
    for group, place in zip(described, place_groups(members, TRUE_REWARD, kl), strict=True):
        group["true_reward"] = place
    return {
        "score": TRUE_REWARD,
        "before": before_training(members, TRUE_REWARD, kl),
        "limits": limit_lines(members, parameters, TRUE_REWARD, kl),
    }


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

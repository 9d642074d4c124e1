"""Comparisons of groups of runs: which of two is the better one, and where each stands after
equal samples and after equal time. It knows runs and metrics, not how they are shown."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_exp.report.effort import spent_by_phase
from rlhf_exp.report.frontier import mean_of
from rlhf_exp.report.grouping import Group, label_of
from rlhf_exp.report.statistics import Estimate, probability_of_improvement, rounded
from rlhf_exp.runs.reading import Run

MAX_METHODS = 6  # which make 15 pairs
MEASURES = ("task", "reward")  # groups of the configuration that give scores their scale
SLACK = 1.05  # lengths and seconds vary; without it, chance would take an evaluation from a run
Members = Sequence[Sequence[Run]]
Strata = dict[str, np.ndarray]


def improvements(groups: Sequence[Group], members: Members, score: str) -> list[dict[str, Any]]:
    """For each pair of methods the probability that a run of the first scores more than a run of
    the second, at least one half, highest first.

    A method is what groups have in common that differ only in their task and reward, whose scores
    have other scales: these are the strata, and only runs of the same task and reward are compared.
    Without several of them, each group is a method. Of many methods, those with the highest mean
    scores are compared. A group of one run is left out.
    """
    methods: dict[str, Strata] = {}
    for group, runs in zip(groups, members, strict=True):
        scores = [value for run in runs if (value := run.final(score)) is not None]
        method, stratum = _split(group)
        if len(scores) > 1:
            methods.setdefault(method, {})[stratum] = np.array(scores)
    means = {name: float(np.mean([v.mean() for v in s.values()])) for name, s in methods.items()}
    best = sorted(methods, key=lambda name: -means[name])[:MAX_METHODS]
    pairs = [_compared(a, b, methods[a], methods[b]) for a, b in itertools.combinations(best, 2)]
    found = [pair for pair in pairs if pair is not None]
    return sorted(found, key=lambda pair: -pair["probability"]["mean"])


def _split(group: Group) -> tuple[str, str]:
    """The label of the group without the parameters of task and reward, and the label of these."""
    measures = {k: v for k, v in group.parameters.items() if k.partition(".")[0] in MEASURES}
    others = {name: v for name, v in group.parameters.items() if name not in measures}
    return (label_of(others) if measures else group.label), label_of(measures)


def _compared(first: str, second: str, x: Strata, y: Strata) -> dict[str, Any] | None:
    """The entry of a pair, the more probable winner first; None if no stratum has both."""
    shared = [stratum for stratum in x if stratum in y]
    found = probability_of_improvement([(x[stratum], y[stratum]) for stratum in shared])
    if math.isnan(found.mean):
        return None
    if found.mean < 0.5:
        first, second = second, first
        found = Estimate(1 - found.mean, 1 - found.high, 1 - found.low)
    entry = {"first": first, "second": second, "strata": len(shared)}
    return {**entry, "probability": found.rounded()}


def at_equal_cost(members: Members, cost: str, score: str, kl: str) -> dict[str, Any] | None:
    """The means of score and KL of each group at the largest cost that all its runs and those of
    the other groups reach: of each run the last evaluation before it or at most 5 % beyond. None if
    fewer than two groups know their cost."""
    evaluations = {
        number: [_evaluations(run, cost, score) for run in runs]
        for number, runs in enumerate(members)
        if runs
    }
    known = {number: found for number, found in evaluations.items() if all(found)}
    if len(known) < 2:
        return None
    budget = min(found[-1][0] for runs in known.values() for found in runs)
    entries, left_out = [], [number for number in evaluations if number not in known]
    for number, runs in known.items():
        affordable = [[e for e in found if e[0] <= budget * SLACK] for found in runs]
        if not all(affordable):
            left_out.append(number)
            continue
        last = [found[-1] for found in affordable]
        kls = [
            dict(run.curves(kl).points(kl)).get(phase)
            for run, (_, phase, _) in zip(members[number], last, strict=True)
        ]
        entries.append({
            "group": number,
            "spent": rounded(float(np.mean([spent for spent, _, _ in last]))),
            "score": mean_of([value for _, _, value in last]),
            "kl": mean_of([value for value in kls if value is not None]),
        })  # fmt: skip
    return {"cost": cost, "budget": rounded(budget), "groups": entries, "left_out": left_out}


def _evaluations(run: Run, cost: str, score: str) -> list[tuple[float, int, float]]:
    """(spent, phase, score) of each evaluation, as far as the cost is known. Empty if it is known
    for none after phase 0."""
    spent = spent_by_phase(run).get(cost, np.empty(0))
    points = [p for p in run.curves(score).points(score) if p[0] < len(spent)]
    found = [(float(spent[phase]), phase, value) for phase, value in points]
    known = [evaluation for evaluation in found if not math.isnan(evaluation[0])]
    return known if known and known[-1][0] > 0 else []


def kl_estimates(described: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each group whose runs log them, the exact KL of the rollouts and its estimates with their
    variances, each the mean over phases and seeds."""
    names = ["kl", *(f"kl_{n}{end}" for n in ("k1", "k2", "k3") for end in ("", "_var"))]
    entries = []
    for group in described:
        curves = group["curves"]["train"]
        if all(f"objective/{name}" in curves for name in names):
            means = {name: curves[f"objective/{name}"]["mean"] for name in names}
            columns = {n: [v for v in column if v is not None] for n, column in means.items()}
            numbers = {name: rounded(float(np.mean(column))) for name, column in columns.items()}
            entries.append({"group": group["id"], **numbers})
    return entries

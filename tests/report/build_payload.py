"""What a page is made of, with made-up numbers: the least that has every part of it."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

GRID = {"stage.kl_coef": (0.03, 0.1, 0.3, 1.0)}
EVAL = ("eval/score", "eval/kl", "eval/entropy")
WORDS = ("the", "film", "was", "bold", "and", "warm", "but", "slow", "with", "great", "acting", ".")
TRAIN = ("objective/scores", "objective/kl", "policy/clipfrac")


def round_off(value: float) -> float:
    """The number as the page gets it."""
    return float(f"{value:.4g}")


def curve(parameters: Mapping[str, Any], seed: int, phases: Sequence[int], name: str):
    """A line that rises to a plateau: KL and score the higher, the smaller the penalty is."""
    noise = random.Random(f"{parameters} {seed} {name}")
    penalty = parameters.get("stage.kl_coef", 0.3)
    ends = {
        "kl": 0.1 / (0.1 + penalty),
        "score": 0.98 - 0.2 * penalty,
        "scores": 0.97 - 0.2 * penalty,
    }
    start = {"kl": 0.0, "score": 0.52, "scores": 0.52}
    last = name.split("/")[-1]
    low, high = start.get(last, 1.0), ends.get(last, 0.3)
    done = [1 - math.exp(-4 * phase / max(phases[-1], 1)) for phase in phases]
    end = high + noise.gauss(0, 0.03)
    return [round_off(low + (end - low) * share + noise.gauss(0, 0.004)) for share in done]


def run(number: int, group: int, parameters: Mapping[str, Any], seed: int, phases: int):
    """A run that is done."""
    axes = {"train": [*range(1, phases + 1)], "eval": [*range(0, phases + 1, max(phases // 10, 1))]}
    curves = {
        kind: {"phase": axis, **{name: curve(parameters, seed, axis, name) for name in names}}
        for (kind, axis), names in zip(axes.items(), (TRAIN, EVAL), strict=True)
    }
    last = {name.split("/")[-1]: curves["eval"][name][-1] for name in EVAL}
    values = ",".join(f"{key.split('.')[-1]}={value}" for key, value in parameters.items())
    return {
        "id": number,
        "name": f"{number}_{values},seed={seed}",
        "folder": f"/runs/{number}",
        "status": "done",
        "error": None,
        "seed": seed,
        "group": group,
        "parameters": dict(parameters),
        "phases": phases,
        "final": {
            **last,
            "distinct_3": 0.4,
            "best_score": max(curves["eval"]["eval/score"]),
            "seconds": 33.1,
        },
        "warnings": [],
        "curves": curves,
        "samples": [sample(number, index) for index in range(4)],
    }


def sample(number: int, index: int) -> dict[str, Any]:
    """A prompt, continued by the first and by the last policy of a run. The first is the same for
    all runs."""
    before, after = (
        " ".join(random.Random(f"{policy} {index}").choices(WORDS, k=20)) for policy in (-1, number)
    )
    return {
        "prompt": f"review {index} : this movie was",
        "before": before,
        "after": after,
        "score_before": 0.52,
        "score_after": 0.97,
    }


def measured(values: Sequence[float]) -> dict[str, Any]:
    """A mean and an interval, which one value does not have."""
    mean, several = sum(values) / len(values), len(values) > 1
    ends = (min(values), max(values)) if several else (None, None)
    return {"mean": round_off(mean), "low": ends[0], "high": ends[1]}


def group(number: int, members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Runs that differ in their seed alone."""
    curves: dict[str, Any] = {}
    for kind, of_kind in members[0]["curves"].items():
        curves[kind] = {"phase": of_kind["phase"]}
        for name in of_kind.keys() - {"phase"}:
            lines = [run["curves"][kind][name] for run in members]
            points = [measured(values) for values in zip(*lines, strict=True)]
            curves[kind][name] = {end: [p[end] for p in points] for end in ("mean", "low", "high")}
    of_eval = curves["eval"]
    columns = (of_eval["phase"], of_eval["eval/score"]["mean"], of_eval["eval/kl"]["mean"])
    parameters = members[0]["parameters"]
    return {
        "id": number,
        "label": ", ".join(f"{key.split('.')[-1]}={value}" for key, value in parameters.items()),
        "parameters": parameters,
        "runs": [run["id"] for run in members],
        "pareto": False,
        "iqm": None,
        "true_reward": None,
        "score": measured([run["final"]["score"] for run in members]),
        "kl": measured([run["final"]["kl"] for run in members]),
        "efficiency": None,
        "path": [
            dict(zip(("phase", "score", "kl"), point, strict=True))
            for point in zip(*columns, strict=True)
        ],
        "path_axis": "phase",
        "curves": curves,
    }


def payload(
    grid: Mapping[str, Sequence[Any]] = GRID, *, seeds: Sequence[int] = (1, 2, 3), phases: int = 40
) -> dict[str, Any]:
    """A sweep over every combination of the grid's values, each with every seed."""
    runs: list[dict[str, Any]] = []
    groups = []
    for number, values in enumerate(itertools.product(*grid.values())):
        parameters = dict(zip(grid, values, strict=True))
        members = [run(len(runs) + n, number, parameters, s, phases) for n, s in enumerate(seeds)]
        runs += members
        groups.append(group(number, members))
    best = -math.inf
    for one in sorted(groups, key=lambda g: (g["kl"]["mean"], -g["score"]["mean"])):
        one["pareto"] = one["score"]["mean"] > best
        best = max(best, one["score"]["mean"])
    parameters = [key for key, values in grid.items() if len(values) > 1]
    shares = [0.8 / 2**place for place in range(len(parameters))]
    return {
        "title": "reviews: sweep of kl_coef",
        "made": "2026-11-21 02:00",
        "sources": ["/runs"],
        "score": "eval/score",
        "kl": "eval/kl",
        "parameters": parameters,
        "metrics": {"train": [*TRAIN], "eval": [*EVAL]},
        "runs": runs,
        "groups": groups,
        "before": None,
        "limits": [],
        "true_reward": None,
        "improvements": [],
        "equal_cost": [],
        "kl_estimates": [],
        "importance": [
            {"parameter": key, "share": share}
            for key, share in zip(parameters, shares, strict=True)
        ],
        "interactions": [
            {"parameters": [*pair], "share": 0.05} for pair in itertools.combinations(parameters, 2)
        ],
        "importance_note": "Share of the variance of the score that each parameter explains.",
        "common": {"stage.batch_size": 64, "task.prefix": "this movie was really"},
        "differing": {
            **{key: [run["parameters"][key] for run in runs] for key in parameters},
            **({"seed": [run["seed"] for run in runs]} if len(seeds) > 1 else {}),
        },
        "problems": [],
    }

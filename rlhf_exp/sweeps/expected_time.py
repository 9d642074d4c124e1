"""How long a job will take, judged by finished runs of the same shape."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.runs.paths import newest_finished, read_resolved_config, read_result

NEWEST = 50
# What a phase's time depends on, apart from coefficients and rates.
SHAPE = {
    "stage": {"_target_", "batch_size", "num_minibatches", "batches_per_learning_phase",
              "eval_every", "eval_samples", "dtype", "compute"},
    "model": {"_target_", "engine", "num_layers", "d_model"},
    "task": {"_target_", "path"},
    "sampler": {"_target_", "gen_len"},
    "reward": {"_target_"},
}  # fmt: skip
BY_PHASE = ("rollout", "learn", "evaluate")
# Errors of reading damaged or foreign files, absurdly large numbers included.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


def finished_runs(*roots: Path) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Configuration and seconds by part of the newest finished runs below the folders, jobs of
    sweeps included, newest first."""
    runs = []
    for folder in newest_finished(roots)[:NEWEST]:
        try:
            seconds = read_result(folder)["seconds"]
            config = read_resolved_config(folder)
            seconds_by_part = {
                part: float(spent)
                for part, spent in seconds.items()
                if not part.startswith(("total", "prepare."))
            }
        except UNREADABLE:
            continue  # not a run's files, or half written
        if seconds_by_part and isinstance(config, dict):  # else it ended after `prepare`
            runs.append((config, seconds_by_part))
    return runs


def expected_seconds(
    config: Mapping[str, Any],
    finished: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]],
) -> float | None:
    """The seconds that a run takes without `prepare`, scaled from the first finished run of the
    same shape, or None if there is none."""
    shape = _shape(config)
    for other, seconds in finished:
        try:
            if _shape(other) != shape:
                continue
            scale = _phases(config) / _phases(other)
            total = float(sum(v * (scale if k in BY_PHASE else 1) for k, v in seconds.items()))
        except UNREADABLE:
            continue
        if 0 <= total < math.inf:
            return total
    return None


def _phases(config: Mapping[str, Any]) -> int:
    return config["stage"].get("total_phases", 1)


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        group: {key: (config.get(group) or {}).get(key) for key in sorted(keys)}
        for group, keys in SHAPE.items()
    }

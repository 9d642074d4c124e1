"""What a run has spent on training by each phase, from what it logged. It knows no evaluation."""

from collections.abc import Sequence

import numpy as np

from rlhf_exp.runs.reading import Run

COSTS = ("completions", "tokens", "seconds")


def spent_by_phase(run: Run) -> dict[str, np.ndarray]:
    """For each cost an array whose entry p is what the run has spent by the end of phase p:
    completions and tokens sampled for training, and the seconds of its phases, without evaluations,
    loading and saving. NaN from the first phase on that has no number. Empty for runs that do not
    sample in each phase, such as those of DPO and of supervised stages."""
    batch_size = run.config.get("stage.batch_size")
    if "sample/len_mean" not in run.train.values or not isinstance(batch_size, int):
        return {}
    lengths = _by_phase(run, "sample/len_mean")
    seconds = _by_phase(run, "time/rollout_s") + _by_phase(run, "time/learn_s")
    phases = np.arange(len(lengths), dtype=float)
    tokens = np.cumsum(batch_size * lengths)
    return {
        "completions": np.where(np.isnan(tokens), np.nan, batch_size * phases),
        "tokens": tokens,
        "seconds": np.cumsum(seconds),
    }


def at_phases(spent: np.ndarray, phases: Sequence[int]) -> np.ndarray:
    """The entries of the phases; NaN for phases beyond the last."""
    return np.array([spent[phase] if phase < len(spent) else np.nan for phase in phases])


def _by_phase(run: Run, name: str) -> np.ndarray:
    """The metric at phases 0, 1, 2, ...: 0 at phase 0, before training, and NaN if missing."""
    column = np.full(run.train.phases[-1] + 1, np.nan)
    if name in run.train.values:
        column[run.train.phases] = run.train.values[name]
    column[0] = 0.0
    return column

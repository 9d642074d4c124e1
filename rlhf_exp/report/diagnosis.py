"""Common problems of a run, detected from its curves: each warning gives the numbers and a remedy.

The thresholds are rules of thumb; a warning is a reason to look, not a verdict.
"""

import math
from collections.abc import Callable

import numpy as np

from rlhf_exp.report.frontier import KL_OF_COMPLETIONS
from rlhf_exp.report.limits import efficiency
from rlhf_exp.rl.collapse import LOW_ENTROPY, MIN_DISTINCT
from rlhf_exp.runs.reading import Run

MIN_PHASES = 8  # fewer show no trend
KL_RISE, KL_FACTOR = 0.01, 1.5  # nats a token
CLIPPED, OFTEN = 0.4, 0.1  # a clip fraction; a share of phases
MIN_EFFICIENCY = 0.3  # of the KL
OVERFIT = 1.05  # as a multiple of the lowest held-out loss


def diagnose(run: Run) -> list[str]:
    """The run's warnings, most serious first."""
    checks: tuple[Callable[[Run], str | None], ...] = (
        _skipped,
        _not_finite,
        _repeats,
        _low_entropy,
        _kl_for_nothing,
        _wastes_kl,
        _bad_values,
        _clips,
        _overfits,
    )
    return [warning for check in checks if (warning := check(run))]


def _skipped(run: Run) -> str | None:
    steps, rewards = (run.train.last(f"train/skipped_{what}") or 0 for what in ("steps", "rewards"))
    if not steps and not rewards:
        return None
    return (
        f"{steps:g} steps that were not finite and {rewards:g} phases without scores were skipped:"
        " the run trained on less data than planned; train.log names them"
    )


def _not_finite(run: Run) -> str | None:
    if _skipped(run) is not None:
        return None  # the skipped phases are the ones that are not finite
    for name in ("objective/scores", "objective/kl", "loss/total", "train/loss"):
        phases = run.train.nulls.get(name)
        if phases:
            return (
                f"{name} is not finite at phase {phases[0]} ({len(phases)} phases in all): lower"
                " optimizer.base_lr or stage.max_grad_norm, or compute in fp32"
            )
    return None


def _repeats(run: Run) -> str | None:
    for curves, name in ((run.evaluated, "eval/distinct_3"), (run.train, "sample/distinct_3")):
        points = curves.points(name)
        if len(points) < 2:
            continue
        first, last = points[0][1], points[-1][1]
        if last < MIN_DISTINCT * first:
            return (
                f"{name} fell from {first:.3g} to {last:.3g}: completions repeat themselves or each"
                " other (collapse); raise stage.kl_coef or stage.ent_coef, stop earlier, and read"
                " the samples: the reward may favour one phrase"
            )
        return None
    return None


def _low_entropy(run: Run) -> str | None:
    points = run.train.points("objective/entropy") or run.evaluated.points("eval/entropy")
    if not points:
        return None
    last = _end(points)
    if last >= LOW_ENTROPY or points[0][1] < LOW_ENTROPY:
        return None
    return (
        f"entropy near 0: {points[0][1]:.3g} at first, {last:.2g} nats a token at the end; the"
        " policy no longer explores; raise stage.ent_coef or stage.kl_coef, unless each prompt has"
        " one right answer"
    )


def _kl_for_nothing(run: Run) -> str | None:
    scores, kls = run.train.points("objective/scores"), run.train.points("objective/kl")
    if len(scores) < MIN_PHASES or len(kls) < MIN_PHASES:
        return None
    end, kl_end, noise = _end(scores), _end(kls), _standard_error(scores)
    for where, start in (("phase 1", 0), ("the middle", len(scores) // 2)):
        before = _mean(scores[start : start + _window(scores)])
        kl_before = _mean(kls[min(start, len(kls) - 1) :][: _window(kls)])
        rises = kl_end - kl_before > KL_RISE and kl_end > KL_FACTOR * kl_before
        if rises and end <= before + noise:
            return (
                f"KL rises with no reward: from {where} on KL went {kl_before:.3g} -> {kl_end:.3g}"
                f" nats a token, the score {before:.3g} -> {end:.3g}; raise stage.kl_coef, lower"
                " optimizer.base_lr, or stop earlier"
            )
    return None


def _wastes_kl(run: Run) -> str | None:
    share, kl = efficiency(run), run.evaluated.last(KL_OF_COMPLETIONS)
    if share is None or share >= MIN_EFFICIENCY or kl is None:
        return None
    return (
        f"KL efficiency {share:.2g}: the last evaluation's score costs {kl:.3g} nats a completion,"
        f" where {share * kl:.2g} would do; try stage.kl_penalty=return, a smaller"
        " optimizer.base_lr with a larger stage.batch_size, or stage.average_weights"
    )


def _bad_values(run: Run) -> str | None:
    points = run.train.points("val/explained_variance")
    if len(points) < MIN_PHASES:
        return None
    late = _mean(points[-(len(points) // 4) :])
    if late >= 0:
        return None
    return (
        f"value explained variance {late:.2g} over the last quarter: the value head predicts worse"
        " than a constant; raise optimizer.head_lr, stage.vf_coef or stage.batch_size"
    )


def _clips(run: Run) -> str | None:
    points = run.train.points("policy/clipfrac")
    above = [phase for phase, value in points if value > CLIPPED]
    if not above or len(above) < OFTEN * len(points):
        return None
    most = max(value for _, value in points)
    return (
        f"clip fraction above {CLIPPED} in {len(above)} of {len(points)} phases (at most"
        f" {most:.2g}, first at phase {above[0]}): updates are too large; lower optimizer.base_lr"
        " or take fewer minibatches a phase"
    )


def _overfits(run: Run) -> str | None:
    points = run.evaluated.points("heldout/loss")
    if len(points) < 3:
        return None
    phase, lowest = min(points, key=lambda point: point[1])
    last = points[-1][1]
    if lowest <= 0 or last <= OVERFIT * lowest:
        return None
    return (
        f"held-out loss rose from {lowest:.4g} (phase {phase}) to {last:.4g}: overfitting; train"
        " for fewer epochs, on more data, or with a lower optimizer.base_lr"
    )


def _window(points: list[tuple[int, float]]) -> int:
    return max(2, len(points) // 10)


def _mean(points: list[tuple[int, float]]) -> float:
    return float(np.mean([value for _, value in points])) if points else math.nan


def _end(points: list[tuple[int, float]]) -> float:
    return _mean(points[-_window(points) :])


def _standard_error(points: list[tuple[int, float]]) -> float:
    """The standard error of a window's mean, from differences between neighboring phases, which
    the trend does not affect."""
    steps = np.diff([value for _, value in points])
    return float(np.std(steps) / math.sqrt(2 * _window(points)))

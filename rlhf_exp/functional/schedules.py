"""Multipliers of the learning rate as functions of the step. Knows numbers, not optimizers."""

import math


def warmup_decay(step: int, *, warmup_steps: int, total_steps: int, final_scale: float) -> float:
    """Multiplier of step 0, 1, 2, ...: a linear rise to 1, then a linear fall to final_scale.

    (step + 1) / warmup_steps during warm-up, so that step 0 is above 0; 1 at step warmup_steps;
    final_scale from total_steps on. Raises ValueError unless 0 <= warmup_steps < total_steps and
    step >= 0.
    """
    _check(step, warmup_steps=warmup_steps, total_steps=total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 1 - (1 - final_scale) * _progress(step, warmup_steps, total_steps)


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, final_scale: float) -> float:
    """`warmup_decay` with half a cosine instead of the linear fall."""
    _check(step, warmup_steps=warmup_steps, total_steps=total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    cosine = (1 + math.cos(math.pi * _progress(step, warmup_steps, total_steps))) / 2
    return final_scale + (1 - final_scale) * cosine


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    return min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))


def _check(step: int, *, warmup_steps: int, total_steps: int) -> None:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must be at least 0 and below total_steps={total_steps}"
        )
    if step < 0:
        raise ValueError(f"step={step} must be at least 0")

"""The schedule group: multipliers of the learning rates."""

from abc import ABC, abstractmethod

import torch

from rlhf_exp.functional.schedules import warmup_cosine, warmup_decay
from rlhf_exp.settings import ConfigError, Fraction, Index, settings


@settings
class Schedule(ABC):
    """A multiplier of the learning rates by step; a step is a phase in PPO, an update elsewhere."""

    @abstractmethod
    def multiplier(self, step: int, *, total_steps: int) -> float:
        """The multiplier at step 0, 1, ... Raises ValueError if total_steps is too small."""

    def build(
        self, optimizer: torch.optim.Optimizer, *, total_steps: int
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """The scheduler; call its step() after each step. Raises ConfigError if total_steps is too
        small."""
        try:
            self.multiplier(0, total_steps=total_steps)
        except ValueError as error:
            raise ConfigError(f"schedule: {error}") from error
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.multiplier(step, total_steps=total_steps)
        )


@settings
class WarmupDecay(Schedule):
    """Linear rise over warmup_steps, then a linear fall to final_scale."""

    warmup_steps: Index = 5
    """Steps of the rise."""
    final_scale: Fraction = 0.1
    """Multiplier at the end, 0-1."""

    def multiplier(self, step: int, *, total_steps: int) -> float:
        """functional.schedules.warmup_decay."""
        return warmup_decay(
            step,
            warmup_steps=self.warmup_steps,
            total_steps=total_steps,
            final_scale=self.final_scale,
        )


@settings
class Cosine(Schedule):
    """Linear rise over warmup_steps, then half a cosine down to final_scale."""

    warmup_steps: Index = 5
    """Steps of the rise."""
    final_scale: Fraction = 0.1
    """Multiplier at the end, 0-1."""

    def multiplier(self, step: int, *, total_steps: int) -> float:
        """functional.schedules.warmup_cosine."""
        return warmup_cosine(
            step,
            warmup_steps=self.warmup_steps,
            total_steps=total_steps,
            final_scale=self.final_scale,
        )


@settings
class Constant(Schedule):
    """1 at every step."""

    def multiplier(self, step: int, *, total_steps: int) -> float:
        return 1.0


def check_schedule(schedule: Schedule, *, total_steps: int, field: str) -> list[str]:
    """Messages about a schedule that does not fit `total_steps`; `field` names the stage's key that
    sets their number."""
    warmup = getattr(schedule, "warmup_steps", 0)
    if warmup >= total_steps:
        return [
            f"schedule.warmup_steps={warmup} must be below {field}={total_steps}: lower the first"
            " or raise the second"
        ]
    return []

"""The KL penalty's coefficient over a run: fixed, or adapted to a target."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_exp.functional.kl_controller import CLIP, adapted_kl_coef
from rlhf_exp.rl.state import TrainState


@dataclass(frozen=True, kw_only=True)
class KLCoefficient:
    """The stage's kl_coef, adaptive_kl_target (nats a completion) and kl_horizon (completions)."""

    start: float
    target: float | None
    horizon: float
    batch_size: int

    def problems(self) -> Iterator[str]:
        """Yields why these settings cannot adapt the coefficient."""
        if self.target is None:
            return
        if self.start == 0:
            yield (
                f"adaptive_kl_target={self.target:g} scales kl_coef, and kl_coef=0 would stay 0:"
                " set the kl_coef to start from, such as 0.2, or adaptive_kl_target=null"
            )
        if CLIP * self.batch_size >= self.horizon:
            yield (
                f"kl_horizon={self.horizon:g} must be above {CLIP} x batch_size={self.batch_size}:"
                " a phase could bring kl_coef below 0"
            )

    def now(self, state: TrainState) -> float:
        """The coefficient of the state's phase."""
        return self.start if state.kl_coef is None else state.kl_coef

    def adapt(self, state: TrainState, *, kl_sum: float, score: float) -> None:
        """Sets the coefficient of the next phase from the KL of this one's samples. A phase without
        scores changes nothing."""
        if self.target is not None and not math.isnan(score):
            state.kl_coef = adapted_kl_coef(
                self.now(state), kl_sum, target=self.target,
                num_completions=self.batch_size, horizon=self.horizon,
            )  # fmt: skip

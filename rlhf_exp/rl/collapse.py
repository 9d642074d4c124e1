"""Warnings of a policy's collapse while it trains: log lines, and metrics that are 0 or 1.

The thresholds are rules of thumb; a warning is a reason to look, not a verdict.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool
from torch import Tensor

from rlhf_exp.types import Rollout

log = logging.getLogger(__name__)

BASELINE_PHASES = 5  # later phases are compared with the mean of these
WARMUP_PHASES = 8  # after these, values should predict the returns
MIN_DISTINCT = 0.5  # as a fraction of the distinct-3 at the start of training
LOW_ENTROPY = 0.1  # nats a token
HIGH_KL = 1.0  # nats a token: each token is e times as likely as to the reference
BAD_VALUES = -1.0  # explained variance

Sign = tuple[bool, str]


@dataclass(kw_only=True)
class CollapseMonitor:
    """Compares each phase with the first ones. A warning is logged when it appears, and again
    only after a phase without it."""

    first_distinct: list[float] = field(default_factory=list)
    first_entropy: list[float] = field(default_factory=list)
    up: list[str] = field(default_factory=list)
    """The active warnings, by name."""

    def update(
        self,
        phase: int,
        metrics: Mapping[str, float],
        rollout: Rollout,
        *,
        gen_len: int,
        ended: Bool[Tensor, " batch"] | None,
    ) -> dict[str, float]:
        """The warnings as metrics; new ones are logged. `ended` says which completions end with
        EOS, None if sampling does not stop at it."""
        if len(self.first_distinct) < BASELINE_PHASES:
            self.first_distinct.append(metrics["sample/distinct_3"])
            self.first_entropy.append(metrics["objective/entropy"])
        signs = self._metric_signs(phase, metrics)
        signs |= _rollout_signs(rollout, gen_len=gen_len, ended=ended)
        for name, (is_active, text) in signs.items():
            if is_active and name not in self.up:
                log.warning("phase %d, %s: %s", phase, name, text)
        self.up = [name for name, (is_active, _) in signs.items() if is_active]
        return {name: float(is_active) for name, (is_active, _) in signs.items()}

    def _metric_signs(self, phase: int, metrics: Mapping[str, float]) -> dict[str, Sign]:
        first_distinct = sum(self.first_distinct) / len(self.first_distinct)
        distinct, entropy = metrics["sample/distinct_3"], metrics["objective/entropy"]
        kl = metrics["objective/kl"]
        signs = {
            "warn/repeats": (
                distinct < MIN_DISTINCT * first_distinct,
                f"sample/distinct_3 fell from {first_distinct:.3g} to {distinct:.3g}: completions"
                " repeat themselves or each other; raise stage.kl_coef or stage.ent_coef, and read"
                " samples.jsonl: the reward may favour one phrase",
            ),
            "warn/low_entropy": (
                entropy < LOW_ENTROPY <= self.first_entropy[0],
                f"the entropy is {entropy:.2g} nats a token: the policy no longer explores; raise"
                " stage.ent_coef or stage.kl_coef, unless each prompt has one right answer",
            ),
            "warn/high_kl": (
                kl > HIGH_KL,
                f"the KL to the reference is {kl:.3g} nats a token; raise stage.kl_coef or lower"
                " optimizer.base_lr",
            ),
        }
        if (variance := metrics.get("val/explained_variance")) is not None:
            signs["warn/bad_values"] = (
                phase > WARMUP_PHASES and variance < BAD_VALUES,
                f"val/explained_variance is {variance:.3g}: the value head predicts far worse"
                " than a constant; raise optimizer.head_lr, stage.vf_coef or"
                " stage.batch_size",
            )
        return signs


def _rollout_signs(
    rollout: Rollout, *, gen_len: int, ended: Bool[Tensor, " batch"] | None
) -> dict[str, Sign]:
    scores, lengths = rollout.scores, rollout.completions.mask.sum(dim=1)
    return {
        "warn/equal_scores": (
            len(scores) > 1 and bool((scores == scores[0]).all()),
            f"all {len(scores)} scores are {scores[0].item():.3g} and do not say which completion"
            " is better: the policy learns nothing from them; check the reward, or raise"
            " stage.batch_size or sampler.temperature",
        ),
        "warn/one_token": (
            gen_len > 1 and bool((lengths == 1).all()),
            "every completion is a single token; read samples.jsonl: the reward may favour empty"
            " answers",
        ),
        "warn/never_ends": (
            ended is not None and not bool(ended.any()),
            f"no completion ends within sampler.gen_len={gen_len}; raise it, or set"
            " stage.missing_eos_penalty",
        ),
    }

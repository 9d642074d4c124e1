"""Limits on a run: when to skip a step or a phase, and when to stop.

They read metrics; they know neither policy nor reward.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_exp.rewards.attempts import RetryPolicy
from rlhf_exp.rl.state import TrainState
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import Index, NonNegative, Positive, settings

log = logging.getLogger(__name__)


@settings
class Guards:
    """Limits on KL, on non-finite steps and on failing rewards."""

    max_approx_kl: Positive | None = None
    """Stops a phase's learning before the first step whose policy/approxkl exceeds it (nats a
    token, 0.01-0.1); null: never."""
    max_kl_sum: Positive | None = None
    """Nats a completion (objective/kl_sum), 5-100: the run ends after the first phase above it;
    null: no limit."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """stop: a loss or gradient that is not finite ends the run; skip: the run skips that step."""
    on_reward_error: Literal["stop", "retry", "skip"] = "stop"
    """If a reward raises, hangs or is not finite: stop the run; retry; or skip (retry, then learn
    nothing from the phase). Evaluations are never skipped: that would change their prompts."""
    reward_retries: Index = 3
    """Attempts after the first with retry and skip, 0-10."""
    reward_retry_wait_s: NonNegative = 1.0
    """Seconds before the second attempt, doubled before each further one, 0-60."""
    reward_timeout_s: Positive | None = 1800.0
    """Seconds after which a call of the reward counts as hanging, 1-7200; null: no limit, and the
    main thread calls the reward unless async_reward is true."""
    max_skipped: Index = 10
    """Most steps and phases that a run may skip, 0-100."""

    @property
    def retry(self) -> RetryPolicy:
        """How long to wait for a reward, and how often to retry it."""
        retries = 0 if self.on_reward_error == "stop" else self.reward_retries
        return RetryPolicy(
            retries=retries, wait_s=self.reward_retry_wait_s, timeout_s=self.reward_timeout_s
        )


class Verdict(NamedTuple):
    """`take`: take the optimizer step of the minibatch. `stop`: stop learning from the rollout."""

    take: bool
    stop: bool


def judge(guards: Guards, metrics: Mapping[str, Tensor]) -> Verdict:
    """The verdict on a minibatch from its metrics and gradient norms.

    With on_nonfinite="stop" each step is checked on a CPU only. On a GPU that would make the host
    wait, so `metrics.mean_over_steps` checks them at the end of the phase.
    """
    limit = guards.max_approx_kl
    if limit is not None and bool(metrics["policy/approxkl"] > limit):
        return Verdict(take=False, stop=True)
    if guards.on_nonfinite == "stop" and metrics["loss/total"].device.type != "cpu":
        return Verdict(take=True, stop=False)
    telling = [value for name, value in metrics.items() if must_be_finite(name)]
    finite = bool(torch.stack(telling).isfinite().all())
    return Verdict(take=finite, stop=not finite and guards.on_nonfinite == "stop")


def must_be_finite(name: str) -> bool:
    """Returns True if an optimizer step requires that the metric of that name is finite."""
    return name == "loss/total" or name.startswith("grad_norm/")


def nonfinite(step: Mapping[str, float]) -> str | None:
    """A message with loss terms and gradient norms if the step's loss or gradient is not finite;
    else None."""
    if all(math.isfinite(value) for name, value in step.items() if must_be_finite(name)):
        return None
    what = "gradient" if math.isfinite(step["loss/total"]) else "loss"
    terms = (f"{k} {v:g}" for k, v in step.items() if k.startswith(("loss/", "grad_norm/")))
    return f"the {what} is not finite ({', '.join(terms)})"


def check_finite(steps: Sequence[Mapping[str, float]], phase: int) -> None:
    """Raises TrainingError naming the phase and the first step whose loss or gradient is not
    finite, with loss terms and gradient norms."""
    for number, step in enumerate(steps, 1):
        if (fault := nonfinite(step)) is not None:
            raise TrainingError(
                f"phase {phase}, step {number}: {fault}; lower optimizer.base_lr and"
                " optimizer.head_lr, raise stage.kl_coef, or skip such steps with"
                " stage.guards.on_nonfinite=skip"
            )


def check_skipped(guards: Guards, state: TrainState) -> None:
    """Raises TrainingError if the run has skipped more than max_skipped."""
    steps, rewards = state.skipped_steps, state.skipped_rewards
    if steps + rewards > guards.max_skipped:
        raise TrainingError(
            f"phase {state.phase}: {steps} steps that were not finite and {rewards} phases"
            " without scores were skipped, more than"
            f" stage.guards.max_skipped={guards.max_skipped}: fix what train.log names, or lower"
            " optimizer.base_lr and optimizer.head_lr"
        )


def check_kl_sum(guards: Guards, state: TrainState, kl_sum: float) -> None:
    """Stops the run after this phase if its KL (nats a completion) exceeds max_kl_sum."""
    if guards.max_kl_sum is not None and kl_sum > guards.max_kl_sum:
        state.stopped = (
            f"phase {state.phase}: objective/kl_sum is {kl_sum:.4g} nats a completion, above"
            f" stage.guards.max_kl_sum={guards.max_kl_sum:g}"
        )
        state.kl_sum_at_stop = kl_sum
        log.info("%s: the run ends", state.stopped)


def clear_stop_if_allowed(guards: Guards, state: TrainState) -> None:
    """Lets a resumed run that stopped at max_kl_sum go on if the limit is higher now."""
    if state.kl_sum_at_stop is None:
        return
    if guards.max_kl_sum is None or state.kl_sum_at_stop <= guards.max_kl_sum:
        state.stopped = state.kl_sum_at_stop = None
    else:
        log.warning("%s: no phase follows; raise stage.guards.max_kl_sum to go on", state.stopped)

"""The metrics of a phase, from its samples and its minibatches."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_exp.functional.logprobs import KL_ESTIMATORS, kl_estimate
from rlhf_exp.functional.masking import masked_mean, masked_var
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.rl.guards import Guards, check_finite, check_skipped, nonfinite
from rlhf_exp.rl.kl_coefficient import KLCoefficient
from rlhf_exp.rl.objectives import Objective
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.sampler import have_ended
from rlhf_exp.training.optim import learning_rates
from rlhf_exp.types import Experience

log = logging.getLogger(__name__)


def distinct_n(tokens: Int[Tensor, "batch completion"], mask: Bool[Tensor, "batch completion"],
               *, n: int) -> float:  # fmt: skip
    """Distinct n-grams of tokens divided by all of them, over the whole batch; 0 if there are none.

    It falls with the number of samples, so compare it at equal numbers only.
    """
    grams = [
        tuple(row[i : i + n])
        for row, real in zip(tokens.tolist(), mask.sum(dim=1).tolist(), strict=True)
        for i in range(real - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def explained_variance(
    values: Float[Tensor, "batch completion"],
    returns: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is perfect, 0 no better than a
    constant. 0 if the returns do not vary."""
    variance = masked_var(returns, mask)
    if variance == 0:
        return 0.0
    return float(1 - masked_var(returns - values, mask) / variance)


def sampled_kl(
    logprobs: Float[Tensor, "batch completion"],
    ref_logprobs: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
) -> dict[str, Float[Tensor, ""]]:
    """The means k1, k2, k3 of functional.logprobs.kl_estimate over real tokens, in nats, and their
    variances over tokens, k1_var, k2_var, k3_var."""
    numbers: dict[str, Tensor] = {}
    for name in KL_ESTIMATORS:
        estimate = kl_estimate(logprobs, ref_logprobs, name)
        numbers[name] = masked_mean(estimate, mask)
        numbers[f"{name}_var"] = masked_var(estimate, mask)
    return numbers


def read_metrics(rows: Iterable[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """Rows with the same metric names as floats, copied from the GPU in one transfer."""
    rows = list(rows)
    names = list(rows[0])
    numbers = torch.stack([torch.stack([row[name] for name in names]) for row in rows]).tolist()
    return [dict(zip(names, row, strict=True)) for row in numbers]


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over rows with the same metric names."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def rollout_metrics(experience: Experience, *, truncates: bool) -> dict[str, float]:
    """Metrics of a rollout before learning from it. KL is exact, of the policy that sampled."""
    rollout, mask = experience.rollout, experience.rollout.completions.mask
    metrics = {
        "objective/scores": rollout.scores.mean().item(),
        "objective/scores_std": rollout.scores.std(correction=0).item(),
        "objective/kl": masked_mean(rollout.kl, mask).item(),
        "objective/kl_sum": rollout.kl.sum(dim=1).mean().item(),
        **{
            f"objective/kl_{name}": number.item()
            for name, number in sampled_kl(rollout.logprobs, rollout.ref_logprobs, mask).items()
        },
        "objective/entropy": masked_mean(rollout.entropy, mask).item(),
        "sample/len_mean": mask.sum(dim=1).float().mean().item(),
        "sample/distinct_3": distinct_n(rollout.completions.tokens, mask, n=3),
    }
    if rollout.values is not None and experience.returns is not None:
        explained = explained_variance(rollout.values, experience.returns, mask)
        metrics["val/explained_variance"] = explained
    if truncates:
        metrics["sample/kept_mass"] = masked_mean(rollout.kept_mass, mask).item()
    return metrics


def mean_over_steps(
    guards: Guards,
    state: TrainState,
    minibatches: Sequence[Mapping[str, float]],
    names: Sequence[str],
) -> dict[str, float]:
    """The means of the minibatches' metrics over the steps that were taken, and the number of these
    steps as policy/steps. If no step was taken, the metrics `names` are NaN.

    Counts skipped steps in the state. Raises TrainingError that names phase and step for a loss or
    gradient that is not finite with on_nonfinite="stop", and as `check_skipped` does.
    """
    if guards.on_nonfinite == "stop":
        check_finite(minibatches, state.phase)
    for number, metrics in enumerate(minibatches, 1):
        if (fault := nonfinite(metrics)) is not None:
            state.skipped_steps += 1
            log.warning("phase %d, step %d is skipped: %s", state.phase, number, fault)
    check_skipped(guards, state)
    taken = [metrics for metrics in minibatches if metrics["policy/steps"]]
    if not taken:
        return dict.fromkeys(names, math.nan) | {"policy/steps": 0.0}
    return mean_metrics(taken) | {"policy/steps": float(len(taken))}


def phase_metrics(
    state: TrainState,
    setup: Setup,
    guards: Guards,
    objective: Objective,
    kl_coefficient: KLCoefficient,
    lap: Stopwatch,
    experience: Experience,
    updates: Sequence[Mapping[str, float]],
    credited: Mapping[str, float],
) -> dict[str, float]:
    """The metrics of a phase, with `credited` of the estimator. Counts skipped steps and raises as
    `mean_over_steps` does."""
    rates, kl_coef = learning_rates(state.optimizer), kl_coefficient.now(state)
    losses = objective.metric_names(with_values=experience.returns is not None)
    names = (*losses, *(f"grad_norm/{name}" for name in rates))
    learned = mean_over_steps(guards, state, updates, names)
    rollout, sampler = experience.rollout, setup.sampler
    metrics = rollout_metrics(experience, truncates=sampler.truncates)
    ended = None
    if sampler.stop_at_eos:
        ended = have_ended(rollout.completions, setup.policy.tokenizer)
    metrics |= state.collapse.update(
        state.phase, metrics, rollout, gen_len=sampler.gen_len, ended=ended
    )
    seconds = lap.take()
    return {
        **metrics,
        **credited,
        "objective/kl_coef": kl_coef,
        **learned,
        "train/skipped_steps": float(state.skipped_steps),
        "train/skipped_rewards": float(state.skipped_rewards),
        **{f"lr/{name}": rate for name, rate in rates.items()},
        **{f"time/{name}_s": value for name, value in seconds.items()},
        "time/tokens_per_s": rollout.completions.mask.sum().item()
        / (seconds["rollout"] + seconds["learn"]),
    }

"""Learning from one rollout: rewards and advantages, minibatches, optimizer steps, and when a step
is not taken."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from rlhf_exp.functional.advantages import (
    gae,
    normalize_reward,
    terminal_rewards,
    zero_without_signal,
)
from rlhf_exp.functional.kl_controller import CLIP, adapted_kl_coef
from rlhf_exp.functional.logprobs import kl_estimate
from rlhf_exp.functional.masking import masked_whiten
from rlhf_exp.models.policy import CausalTransformer
from rlhf_exp.models.reference import Reference
from rlhf_exp.rl.actors import Actors
from rlhf_exp.rl.histograms import LastPass
from rlhf_exp.rl.objectives import TERMS, Objective
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.sampler import have_ended
from rlhf_exp.settings import Count, Fraction, Index, Positive, settings
from rlhf_exp.training.context import TrainingError
from rlhf_exp.training.metrics import mean_metrics
from rlhf_exp.training.optim import (
    check_finite,
    clip_gradients,
    learning_rates,
    nonfinite,
    tells_finite,
)
from rlhf_exp.types import Experience, Layout, Rollout

log = logging.getLogger(__name__)


@settings
class Learning(Objective):
    """Hyperparameters of learning from a rollout, beside the objective's."""

    batch_size: Count = 32
    num_minibatches: Count = 4
    batches_per_learning_phase: Count = 2
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    normalize_reward: bool = True
    whiten_advantages: Literal["batch", "minibatch", "none"] = "batch"
    max_grad_norm: Positive = 1.0
    micro_batch_size: Count | None = None
    gradient_checkpointing: bool = False
    kl_target: Positive | None = None
    kl_horizon: Positive = 10000.0
    target_kl: Positive | None = None
    kl_budget: Positive | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: Index = 10

    @model_validator(mode="after")
    def _adapts(self) -> "Learning":
        if self.kl_target is None:
            return self
        if self.kl_coef == 0:
            raise ValueError(
                f"kl_target={self.kl_target:g} multiplies kl_coef, and kl_coef=0 would stay 0: set"
                " kl_coef to where it begins, such as 0.2, or kl_target=null"
            )
        if CLIP * self.batch_size >= self.kl_horizon:
            raise ValueError(
                f"kl_horizon={self.kl_horizon:g} must be above {CLIP} x"
                f" batch_size={self.batch_size}: a phase could bring kl_coef below 0"
            )
        return self

    @property
    def minibatch_size(self) -> int:
        """Completions an optimizer step."""
        return self.batch_size // self.num_minibatches

    def kl_coef_of(self, state: TrainState) -> float:
        """The KL's coefficient in the state's next phase."""
        return self.kl_coef if state.kl_coef is None else state.kl_coef

    def build_experience(self, rollout: Rollout, *, kl_coef: float | None = None) -> Experience:
        """Rewards, advantages and returns of a rollout. With kl_penalty="reward" each token is
        charged kl_coef (log p - log q), the k1 estimate: the exact KL of a position does not
        depend on the token emitted there, so it would give that token no credit. `kl_coef` is by
        default the stage's own. Advantages are 0 where rewards, that charge included, are the same
        for all completions; returns are not, so the values still learn."""
        mask = rollout.completions.mask
        scores = normalize_reward(rollout.scores) if self.normalize_reward else rollout.scores
        rewards = terminal_rewards(scores, mask)
        if self.kl_penalty == "reward":
            k1 = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")
            rewards = rewards - (self.kl_coef if kl_coef is None else kl_coef) * k1
        advantages = gae(
            rollout.values, rewards, mask, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        returns = advantages + rollout.values
        if self.whiten_advantages == "batch":
            advantages = masked_whiten(advantages, mask)
        advantages = zero_without_signal(advantages, rewards)
        return Experience(rollout=rollout, rewards=rewards, advantages=advantages, returns=returns)

    def learn(
        self,
        state: TrainState,
        experience: Experience,
        reference: Reference,
        *,
        temperature: float,
        seen: LastPass | None = None,
    ) -> Iterator[Mapping[str, Tensor]]:
        """The optimizer steps of one phase; yields the metrics of each minibatch, "policy/steps"
        being 1 if a step was taken with it and 0 if not.

        None is taken, and none follows, once policy/approxkl of the minibatch about to be used is
        above target_kl. None is taken with a loss or gradient that is not finite, after which
        on_nonfinite="stop" ends as well, but on the CPU alone: elsewhere asking would make the host
        wait at every step, and `sum_up` finds it at the phase's end.
        """
        layout = Layout.of(experience.rollout.completions, whole=state.policy.is_compiled)
        for _ in range(self.batches_per_learning_phase):
            if seen is not None:
                seen.restart()
            order = torch.randperm(self.batch_size, generator=state.minibatch_generator)
            for index in order.split(self.minibatch_size):
                minibatch = self._whitened(experience[index])
                state.optimizer.zero_grad(set_to_none=False)
                metrics = self.backward(
                    state, minibatch, reference, temperature=temperature, layout=layout[index],
                    seen=seen,
                )  # fmt: skip
                norms = clip_gradients(state.optimizer, self.max_grad_norm)
                metrics |= {f"grad_norm/{k}": v for k, v in norms.items()}
                far, broken = self._is_far(metrics), self._is_broken(metrics)
                if not far and not broken:
                    state.optimizer.step()
                    state.policy.weights_changed()
                taken = torch.full_like(metrics["loss/total"], not far and not broken)
                yield metrics | {"policy/steps": taken}
                if far or (broken and self.on_nonfinite == "stop"):
                    return

    def _is_far(self, metrics: Mapping[str, Tensor]) -> bool:
        limit = self.target_kl
        return limit is not None and bool(metrics["policy/approxkl"] > limit)

    def _is_broken(self, metrics: Mapping[str, Tensor]) -> bool:
        if self.on_nonfinite == "stop" and metrics["loss/total"].device.type != "cpu":
            return False
        telling = [value for name, value in metrics.items() if tells_finite(name)]
        return not bool(torch.stack(telling).isfinite().all())

    def sum_up(
        self, state: TrainState, minibatches: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """The metrics of a phase from those of its minibatches: means over the steps taken, NaN
        if none was, and their number.

        Counts in the state what was skipped. Raises TrainingError naming phase and step for a loss
        or gradient that is not finite if on_nonfinite="stop", and as `check_skipped` does.
        """
        if self.on_nonfinite == "stop":
            check_finite(minibatches, state.phase)
        for number, metrics in enumerate(minibatches, 1):
            if (fault := nonfinite(metrics)) is not None:
                state.skipped_steps += 1
                log.warning("phase %d, step %d is skipped: %s", state.phase, number, fault)
        self.check_skipped(state)
        taken = [metrics for metrics in minibatches if metrics["policy/steps"]]
        if not taken:
            return self.nothing_learned(state)
        return mean_metrics(taken) | {"policy/steps": float(len(taken))}

    def nothing_learned(self, state: TrainState) -> dict[str, float]:
        """The metrics of a phase without a step."""
        norms = (f"grad_norm/{name}" for name in learning_rates(state.optimizer))
        return dict.fromkeys((*TERMS, *norms), math.nan) | {"policy/steps": 0.0}

    def check_skipped(self, state: TrainState) -> None:
        """Raises TrainingError if more was skipped over the run than max_skipped."""
        steps, rewards = state.skipped_steps, state.skipped_rewards
        if steps + rewards > self.max_skipped:
            raise TrainingError(
                f"phase {state.phase}: {steps} steps that were not finite and {rewards} phases"
                f" without scores were skipped, more than stage.max_skipped={self.max_skipped}:"
                " mend what train.log names, or lower optimizer.base_lr and optimizer.head_lr"
            )

    def _whitened(self, minibatch: Experience) -> Experience:
        if self.whiten_advantages != "minibatch":
            return minibatch
        mask = minibatch.rollout.completions.mask
        whitened = masked_whiten(minibatch.advantages, mask)
        return replace(minibatch, advantages=zero_without_signal(whitened, minibatch.rewards))

    def backward(
        self,
        state: TrainState,
        minibatch: Experience,
        reference: Reference,
        *,
        temperature: float,
        layout: Layout | None = None,
        seen: LastPass | None = None,
    ) -> dict[str, Tensor]:
        """Adds a minibatch's gradients, a micro-batch at a time, and returns its metrics. Each
        micro-batch counts as much as it has real tokens, so that its size changes memory alone."""
        layout = layout or Layout.of(minibatch.rollout.completions)
        rows = torch.arange(len(layout.mask))
        metrics: dict[str, Tensor] = {}
        for index in rows.split(self.micro_batch_size or len(rows)):
            whole = len(index) == len(rows)
            micro, part = (minibatch, layout) if whole else (minibatch[index], layout[index])
            share = float(part.mask.sum() / layout.mask.sum())
            output = self.loss(
                state.policy, reference, micro, temperature=temperature, layout=part,
                kl_coef=self.kl_coef_of(state),
            )  # fmt: skip
            (share * output.loss).backward()
            if seen is not None:
                seen.add(output.logprobs, micro)
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + share * value
        return metrics

    def memory_knobs(self, actors: Actors) -> list[str]:
        """What makes learning need less memory."""
        size, knobs = self.micro_batch_size or self.minibatch_size, []
        if size > 1:
            knobs.append(f"set stage.micro_batch_size below {size}")
        if actors.policy.engine == "fast" and not self.gradient_checkpointing:
            knobs.append("set stage.gradient_checkpointing=true")
        if isinstance(actors.reference, CausalTransformer):
            knobs.append("train less, with reference=shared_trunk or reference=lora")
        return [*knobs, "lower sampler.gen_len"]

    def look(
        self, state: TrainState, rollout: Rollout, actors: Actors, metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Warnings of collapse, as `Watch.look` gives them."""
        sampler, ended = actors.sampler, None
        if sampler.stop_at_eos:
            ended = have_ended(rollout.completions, actors.policy.tokenizer)
        return state.watch.look(state.phase, metrics, rollout, gen_len=sampler.gen_len, ended=ended)

    def settle(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """What the KL of the phase's samples says of the next one: its coefficient, and whether
        there is one."""
        kl_sum = metrics["objective/kl_sum"]
        if self.kl_target is not None and not math.isnan(metrics["objective/scores"]):
            state.kl_coef = adapted_kl_coef(
                self.kl_coef_of(state), kl_sum, target=self.kl_target,
                num_completions=self.batch_size, horizon=self.kl_horizon,
            )  # fmt: skip
        if self.kl_budget is not None and kl_sum > self.kl_budget:
            state.stopped = (
                f"phase {state.phase}: objective/kl_sum is {kl_sum:.4g} nats a completion, above"
                f" stage.kl_budget={self.kl_budget:g}"
            )
            state.spent_kl = kl_sum
            log.info("%s: the run ends", state.stopped)

    def reconsider(self, state: TrainState) -> None:
        """Has a run that its KL budget ended go on if it has a larger one now."""
        if state.spent_kl is None:
            return
        if self.kl_budget is None or state.spent_kl <= self.kl_budget:
            state.stopped = state.spent_kl = None
        else:
            log.warning("%s: no phase follows; raise stage.kl_budget to go on", state.stopped)

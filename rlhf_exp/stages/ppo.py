"""PPO with a KL penalty to a frozen reference, on completions of a policy with a value head.

A phase is one rollout and several passes of learning over it. Everything that a restart would need
is in TrainState; everything that a user sets is a field of PPO.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from rlhf_exp.functional.advantages import gae, normalize_reward, terminal_rewards
from rlhf_exp.functional.logprobs import (
    completion_logits,
    completion_part,
    entropy,
    kl_divergence,
    kl_estimate,
    token_logprobs,
)
from rlhf_exp.functional.losses import (
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    value_loss,
)
from rlhf_exp.functional.masking import masked_mean, masked_whiten
from rlhf_exp.models.loading import ModelSettings
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import Reference, ReferenceSettings, resident_memory
from rlhf_exp.models.saving import save_policy
from rlhf_exp.rewards.protocol import Reward
from rlhf_exp.rollout.measure import measure
from rlhf_exp.rollout.sampler import Sampler, have_ended
from rlhf_exp.settings import Count, Fingerprinted, Fraction, NonNegative, Positive, settings
from rlhf_exp.stages.actors import Actors, fingerprints, load_actors
from rlhf_exp.stages.evaluation import (
    brief,
    checked_scores,
    evaluate,
    read_evaluations,
    report,
    sample,
)
from rlhf_exp.stages.train_state import TrainState
from rlhf_exp.tasks.protocol import AnswerTask, Task
from rlhf_exp.training.context import Context
from rlhf_exp.training.metrics import mean_metrics, rollout_metrics
from rlhf_exp.training.optim import (
    AdamWSettings,
    Schedule,
    check_finite,
    check_schedule,
    clip_gradients,
    learning_rates,
)
from rlhf_exp.training.progress import Progress
from rlhf_exp.training.timing import Stopwatch
from rlhf_exp.types import Experience, LossOutput, PromptBatch, Rollout

log = logging.getLogger(__name__)

TRUNCATION_NOTE = (
    "top_k/top_p: samples come from a truncated distribution, while log-probs, KL and entropy are"
    " the policy's own; sample/kept_mass is its mass on what is kept"
)


@settings
class PPO:
    """Hyperparameters of the loop. Objective = clipped surrogate - vf_coef value loss
    + ent_coef entropy - kl_coef exact KL, the last only with kl_penalty="loss"."""

    total_phases: Count = 100
    batch_size: Count = 32
    num_minibatches: Count = 4
    batches_per_learning_phase: Count = 2
    clip_coef: Positive = 0.2
    vf_coef: NonNegative = 0.15
    value_clip_coef: Positive | None = None
    ent_coef: NonNegative = 0.001
    kl_coef: NonNegative = 0.2
    kl_penalty: Literal["loss", "reward"] = "loss"
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    normalize_reward: bool = True
    whiten_advantages: Literal["batch", "minibatch", "none"] = "batch"
    max_grad_norm: Positive = 1.0
    missing_eos_penalty: NonNegative | None = None
    rollout_batch_size: Count | None = None
    micro_batch_size: Count | None = None
    gradient_checkpointing: bool = False
    eval_every: Count = 25
    eval_samples: Count = 512
    checkpoint_every: Count | None = 50

    @model_validator(mode="after")
    def _divides(self) -> "PPO":
        if self.batch_size % self.num_minibatches:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of"
                f" num_minibatches={self.num_minibatches}"
            )
        minibatch = f"the minibatch of {self.minibatch_size} (batch_size / num_minibatches)"
        for name, limit, what in (
            ("rollout_batch_size", self.batch_size, f"batch_size={self.batch_size}"),
            ("micro_batch_size", self.minibatch_size, minibatch),
        ):
            if (asked := getattr(self, name) or 1) > limit:
                raise ValueError(f"{name}={asked} is above {what}: lower it, or set it null")
        return self

    @property
    def minibatch_size(self) -> int:
        """Completions an optimizer step."""
        return self.batch_size // self.num_minibatches

    def check(
        self,
        *,
        task: Task,
        model: ModelSettings,
        reference: ReferenceSettings,
        reward: Reward,
        sampler: Sampler,
        schedule: Schedule,
        **_: Any,
    ) -> list[str]:
        """What is wrong between this stage and its parts. Raises ConfigError for a part whose files
        are missing or malformed."""
        for part in (task, model, reward):
            if isinstance(part, Fingerprinted):
                part.fingerprint()
        problems = check_schedule(
            schedule, total_steps=self.total_phases, field="stage.total_phases"
        )
        problems += reference.check(model)
        if self.gradient_checkpointing and model.engine == "hooked":
            problems.append("stage.gradient_checkpointing needs model.engine=fast")
        if self.missing_eos_penalty is not None and not sampler.stop_at_eos:
            problems.append("stage.missing_eos_penalty needs sampler.stop_at_eos=true")
        if isinstance(task, AnswerTask) and not sampler.stop_at_eos:
            problems.append("the task has exact answers, which end: set sampler.stop_at_eos=true")
        return problems

    def run(
        self,
        context: Context,
        *,
        task: Task,
        model: ModelSettings,
        reference: ReferenceSettings,
        reward: Reward,
        sampler: Sampler,
        optimizer: AdamWSettings,
        schedule: Schedule,
    ) -> dict[str, Any]:
        """Trains, evaluates before, between and after, saves the policy; returns the result.

        Raises ConfigError for parts that do not fit each other, before anything is written,
        TrainingError naming the phase if the loss is not finite, and RewardError if a score is not.
        """
        clock = Stopwatch()
        with clock("load"):
            actors = load_actors(context, task, model, reward, sampler, reference)
            state = TrainState.start(
                actors.policy,
                optimizer,
                schedule,
                actors.train_prompts,
                batch_size=self.batch_size,
                total_phases=self.total_phases,
                seed=context.seed,
                inputs=fingerprints(task, model, actors.policy),
            )
            if self.gradient_checkpointing:
                actors.policy.checkpoint_gradients()
            if context.resume:
                state.load(context.folder.path)
                context.folder.rewind(state.phase)
                log.info("going on after phase %d", state.phase)
        context.folder.start()
        memory = resident_memory(actors.policy, actors.reference)
        log.info("%s", memory)
        if sampler.truncates:
            log.info(TRUNCATION_NOTE)
        self._train(context, actors, state, clock)
        with clock("save"):
            save_policy(actors.policy, context.folder.path / "model")
        before, after = read_evaluations(context.folder)
        report(context.folder, before, after)
        return {
            "before": before.metrics,
            "after": after.metrics,
            "memory": asdict(memory),
            "seconds": clock.seconds,
        }

    def _train(self, context: Context, actors: Actors, state: TrainState, clock: Stopwatch) -> None:
        if not context.resume:
            self._evaluate(context, actors, 0, clock)
        with Progress(self.total_phases, unit="phase") as progress:
            while state.phase < self.total_phases:
                metrics = self.phase(state, next(state.prompts), actors, clock)
                context.folder.log(state.phase, metrics)
                progress.advance(state.phase, metrics)
                if self._is_due(self.eval_every, state.phase):
                    self._evaluate(context, actors, state.phase, clock)
                if self._is_due(self.checkpoint_every, state.phase):
                    with clock("save"):
                        state.save(context.folder.path)

    def _is_due(self, every: int | None, phase: int) -> bool:
        return every is not None and (phase % every == 0 or phase == self.total_phases)

    def _evaluate(self, context: Context, actors: Actors, phase: int, clock: Stopwatch) -> None:
        with clock("evaluate"):
            result = evaluate(
                actors.policy,
                actors.reference,
                actors.score,
                actors.sampler,
                actors.eval_prompts,
                num_samples=self.eval_samples,
                seed=context.seed,
                phase=phase,
                answers=actors.answers,
            )
        context.folder.log(phase, result.metrics)
        context.folder.log_samples(phase, result.samples)
        log.info("evaluation at phase %d: %s", phase, brief(result.metrics))

    def phase(
        self, state: TrainState, prompts: PromptBatch, actors: Actors, clock: Stopwatch
    ) -> dict[str, float]:
        """One phase: rollout, experience, learning. Returns its metrics."""
        state.phase += 1
        temperature = actors.sampler.temperature
        lap = Stopwatch()
        with clock("rollout"), lap("rollout"):
            size = self.rollout_batch_size or self.batch_size
            generation = sample(
                actors.sampler,
                state.policy,
                prompts,
                state.sample_generator,
                phase=state.phase,
                rows=size,
            )
            scores = checked_scores(actors.score, generation.completions, phase=state.phase)
            if self.missing_eos_penalty is not None:
                ended = have_ended(generation.completions, state.policy.tokenizer)
                scores = scores - self.missing_eos_penalty * ~ended
            rollout = measure(
                state.policy,
                actors.reference,
                generation,
                scores,
                temperature=temperature,
                rows=size,
            )
            experience = self.build_experience(rollout)
        rates = learning_rates(state.optimizer)
        with clock("learn"), lap("learn"):
            learned = mean_metrics(
                self.learn(state, experience, actors.reference, temperature=temperature)
            )
            state.scheduler.step()
        return {
            **rollout_metrics(experience, truncates=actors.sampler.truncates),
            **learned,
            **{f"lr/{name}": rate for name, rate in rates.items()},
            "time/rollout_s": lap.seconds["rollout"],
            "time/learn_s": lap.seconds["learn"],
            "time/tokens_per_s": rollout.completions.mask.sum().item() / sum(lap.seconds.values()),
        }

    def build_experience(self, rollout: Rollout) -> Experience:
        """Rewards, advantages and returns of a rollout. With kl_penalty="reward" each token is
        charged kl_coef (log p - log q), the k1 estimate: the exact KL of a position does not
        depend on the token emitted there, so it would give that token no credit."""
        mask = rollout.completions.mask
        scores = normalize_reward(rollout.scores) if self.normalize_reward else rollout.scores
        rewards = terminal_rewards(scores, mask)
        if self.kl_penalty == "reward":
            k1 = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")
            rewards = rewards - self.kl_coef * k1
        advantages = gae(
            rollout.values, rewards, mask, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        returns = advantages + rollout.values
        if self.whiten_advantages == "batch":
            advantages = masked_whiten(advantages, mask)
        return Experience(rollout=rollout, rewards=rewards, advantages=advantages, returns=returns)

    def learn(
        self,
        state: TrainState,
        experience: Experience,
        reference: Reference,
        *,
        temperature: float,
    ) -> Iterator[Mapping[str, Tensor]]:
        """The optimizer steps of one phase; yields the metrics of each."""
        for _ in range(self.batches_per_learning_phase):
            order = torch.randperm(self.batch_size, generator=state.minibatch_generator)
            for index in order.to(state.policy.device).split(self.minibatch_size):
                minibatch = self._whitened(experience[index])
                state.optimizer.zero_grad(set_to_none=True)
                metrics = self.backward(state, minibatch, reference, temperature=temperature)
                norms = clip_gradients(state.optimizer, self.max_grad_norm)
                state.optimizer.step()
                yield {**metrics, **{f"grad_norm/{k}": v for k, v in norms.items()}}

    def _whitened(self, minibatch: Experience) -> Experience:
        if self.whiten_advantages != "minibatch":
            return minibatch
        mask = minibatch.rollout.completions.mask
        return replace(minibatch, advantages=masked_whiten(minibatch.advantages, mask))

    def backward(
        self,
        state: TrainState,
        minibatch: Experience,
        reference: Reference,
        *,
        temperature: float,
    ) -> Mapping[str, Tensor]:
        """Adds a minibatch's gradients, a micro-batch at a time, and returns its metrics. Each
        micro-batch counts as much as it has real tokens, so that its size changes memory alone."""
        mask = minibatch.rollout.completions.mask
        rows = torch.arange(len(mask), device=mask.device)
        metrics: dict[str, Tensor] = {}
        for index in rows.split(self.micro_batch_size or len(rows)):
            micro = minibatch if len(index) == len(rows) else minibatch[index]
            share = micro.rollout.completions.mask.sum() / mask.sum()
            output = self.loss(state.policy, reference, micro, temperature=temperature)
            check_finite(output, state.phase)
            (share * output.loss).backward()
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + share * value
        return metrics

    def loss(
        self,
        policy: TransformerWithValueHead,
        reference: Reference,
        batch: Experience,
        *,
        temperature: float,
    ) -> LossOutput:
        """Minus the objective of a minibatch, with its terms."""
        rollout, completions = batch.rollout, batch.rollout.completions
        mask, start = completions.mask, completions.prompt_len
        logits, values = policy(*completions.sequences)
        logits = completion_logits(logits, start).float() / temperature
        values = completion_part(values, start).float()
        logprobs = token_logprobs(logits, completions.tokens)
        surrogate = clipped_surrogate(
            logprobs, rollout.logprobs, batch.advantages, mask, clip_coef=self.clip_coef
        )
        value = self._value_loss(values, batch)
        with torch.no_grad():
            ref_logits = reference.unembed(rollout.ref_hidden).float() / temperature
        kl = masked_mean(kl_divergence(logits, ref_logits), mask)
        ent = masked_mean(entropy(logits), mask)
        kl_in_loss = self.kl_coef if self.kl_penalty == "loss" else 0.0
        objective = surrogate - self.vf_coef * value + self.ent_coef * ent - kl_in_loss * kl
        with torch.no_grad():
            metrics = {
                "loss/total": -objective.detach(),
                "loss/policy": -surrogate.detach(),
                "loss/value": value.detach(),
                "loss/kl": kl.detach(),
                "loss/entropy": ent.detach(),
                "policy/approxkl": masked_mean(kl_estimate(rollout.logprobs, logprobs, "k2"), mask),
                "policy/clipfrac": clip_fraction(
                    logprobs, rollout.logprobs, mask, clip_coef=self.clip_coef
                ),
            }
        return LossOutput(loss=-objective, metrics=metrics)

    def _value_loss(
        self, values: Float[Tensor, "batch completion"], batch: Experience
    ) -> Float[Tensor, ""]:
        mask = batch.rollout.completions.mask
        if self.value_clip_coef is None:
            return value_loss(values, batch.returns, mask)
        return clipped_value_loss(
            values, batch.rollout.values, batch.returns, mask,
            value_clip_coef=self.value_clip_coef,
        )  # fmt: skip

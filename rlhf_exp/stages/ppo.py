"""PPO with a KL penalty to a frozen reference, on completions of a policy with a value head.

A phase is one rollout and several passes of learning over it. Everything that a restart would need
is in TrainState; everything that a user sets is a field of PPO.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from rlhf_exp.functional.advantages import gae, normalize_reward, terminal_rewards
from rlhf_exp.functional.logprobs import kl_estimate
from rlhf_exp.functional.masking import masked_whiten
from rlhf_exp.models.loading import ModelSettings, Pretrained
from rlhf_exp.models.reference import (
    Reference,
    ReferenceSettings,
    compute_reference_in,
    resident_memory,
)
from rlhf_exp.models.saving import save_policy
from rlhf_exp.rewards.protocol import Reward
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.settings import Count, Fingerprinted, Fraction, NonNegative, Positive, settings
from rlhf_exp.stages.actors import Actors, fingerprints, load_actors
from rlhf_exp.stages.collecting import Collector
from rlhf_exp.stages.evaluation import brief, evaluate, read_evaluations, report
from rlhf_exp.stages.histograms import LastPass
from rlhf_exp.stages.objective import Objective
from rlhf_exp.stages.train_state import TrainState
from rlhf_exp.tasks.protocol import AnswerTask, Task
from rlhf_exp.training.context import Context
from rlhf_exp.training.metrics import mean_metrics, read_metrics, rollout_metrics
from rlhf_exp.training.optim import (
    AdamWSettings,
    Schedule,
    check_finite,
    check_schedule,
    clip_gradients,
    learning_rates,
)
from rlhf_exp.training.precision import Dtype, compute_dtype
from rlhf_exp.training.progress import Progress
from rlhf_exp.training.saver import Saver, Together
from rlhf_exp.training.timing import Stopwatch
from rlhf_exp.types import Experience, Layout, Rollout

log = logging.getLogger(__name__)

TRUNCATION_NOTE = (
    "top_k/top_p: samples come from a truncated distribution, while log-probs, KL and entropy are"
    " the policy's own; sample/kept_mass is its mass on what is kept"
)


@settings
class PPO(Objective):
    """Hyperparameters of the loop, beside the objective's."""

    total_phases: Count = 100
    batch_size: Count = 32
    num_minibatches: Count = 4
    batches_per_learning_phase: Count = 2
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    normalize_reward: bool = True
    whiten_advantages: Literal["batch", "minibatch", "none"] = "batch"
    max_grad_norm: Positive = 1.0
    missing_eos_penalty: NonNegative | None = None
    rollout_batch_size: Count | None = None
    micro_batch_size: Count | None = None
    gradient_checkpointing: bool = False
    dtype: Dtype = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    async_reward: bool = False
    eval_every: Count = 25
    eval_samples: Count = 512
    histograms_every: Count | None = 25
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
        if model.engine == "hooked":
            problems += [
                f"stage.{name}={value} needs model.engine=fast"
                for name, value in (("dtype", self.dtype), ("compile", self.compile))
                if value in ("bf16", "on")
            ]
        if self.dtype == "bf16" and isinstance(sampler, BridgeSampler):
            problems.append("stage.dtype=bf16 needs sampler=cached; sampler=bridge is in fp32")
        if self.dtype == "bf16" and isinstance(model, Pretrained) and model.dtype == "fp16":
            problems.append("stage.dtype=bf16 and model.dtype=fp16 exclude each other")
        if self.compile == "on" and self.gradient_checkpointing:
            problems.append("stage.compile=on and stage.gradient_checkpointing exclude each other")
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
            self.prepare(actors)
            state = TrainState.start(
                actors.policy,
                optimizer,
                schedule,
                actors.train_prompts,
                batch_size=self.batch_size,
                total_phases=self.total_phases,
                seed=context.seed,
                inputs=fingerprints(actors.policy.language_model, task=task, model=model),
            )
            clock.seconds = state.seconds  # those of a resumed run go on
            collector = self.collector(actors)
            saver = Saver(
                context,
                Together(loop=state, ahead=collector),
                every=self.checkpoint_every,
                optimizer=state.optimizer,
            )
            if saver.restore():
                log.info("going on after phase %d", state.phase)
        context.folder.start()
        memory = resident_memory(actors.policy, actors.reference)
        log.info("%s", memory)
        with clock("compile"):
            self.warm_up(actors)
        if sampler.truncates:
            log.info(TRUNCATION_NOTE)
        self._train(context, state, collector, saver, clock)
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

    def prepare(self, actors: Actors) -> None:
        """Has policy and reference compute as this stage says: in which precision, with which
        activations kept, compiled or not."""
        policy = actors.policy
        dtype, base = torch.float32, policy.language_model.dtype
        fast = policy.engine == "fast"
        # TransformerLens samples in fp32, and fp16 weights do not mix with bf16.
        if fast and base != torch.float16 and not isinstance(actors.sampler, BridgeSampler):
            width = policy.head.weight.shape[1]
            dtype = compute_dtype(self.dtype, policy.device, width=width)
        policy.compute_in(dtype)
        compute_reference_in(actors.reference, policy, dtype)
        if self.gradient_checkpointing:
            policy.checkpoint_gradients()
        if self.compile == "on" or (
            self.compile == "auto"
            and fast
            and policy.device.type == "cuda"
            and not self.gradient_checkpointing
            and bool(actors.train_prompts.mask.all())  # else widths vary, and each is compiled
        ):
            policy.compile_passes()

    def warm_up(self, actors: Actors) -> None:
        """Has a compiled policy compile what learning runs, so that no phase's time holds it."""
        policy, width = actors.policy, actors.train_prompts.tokens.shape[1]
        if policy.is_compiled:
            rows = self.micro_batch_size or self.minibatch_size
            shape = (rows, width + actors.sampler.gen_len - 1)
            tokens = torch.zeros(shape, dtype=torch.long, device=policy.device)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            padded = not bool(actors.train_prompts.mask.all())
            with policy.working():
                policy.hidden_states(tokens, mask if padded else None).sum().backward()
            policy.zero_grad(set_to_none=True)

    def _train(
        self,
        context: Context,
        state: TrainState,
        collector: Collector,
        saver: Saver,
        clock: Stopwatch,
    ) -> None:
        with saver.steps(), Progress(self.total_phases, unit="phase") as progress:
            if state.phase == 0:
                self._evaluate(context, collector, state, clock)
            while state.phase < self.total_phases:
                another = state.phase + 1 < self.total_phases
                seen = LastPass() if self._is_due(self.histograms_every, state.phase + 1) else None
                metrics = self.phase(state, collector, clock, another=another, seen=seen)
                context.folder.log(state.phase, metrics)
                if seen is not None:
                    context.folder.log_histograms(state.phase, seen.histograms())
                progress.advance(state.phase, metrics)
                score, is_best = None, False
                if self._is_due(self.eval_every, state.phase):
                    score = self._evaluate(context, collector, state, clock)
                    is_best = state.note_evaluation(score)
                with clock("save"):
                    saver.step_done(state.phase, is_last=not another, score=score, is_best=is_best)

    def _is_due(self, every: int | None, phase: int) -> bool:
        return every is not None and (phase % every == 0 or phase == self.total_phases)

    def _evaluate(
        self, context: Context, collector: Collector, state: TrainState, clock: Stopwatch
    ) -> float:
        """Evaluates, logs, and returns the mean score."""
        collector.wait_for_reward()
        actors, phase = collector.actors, state.phase
        with clock("evaluate"), actors.policy.working():
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
        return result.metrics["eval/score"]

    def collector(self, actors: Actors) -> Collector:
        """What makes the rollouts of a run."""
        return Collector(
            actors,
            rows=self.rollout_batch_size or self.batch_size,
            missing_eos_penalty=self.missing_eos_penalty,
            overlap=actors.policy.device.type == "cuda",
            ahead=self.async_reward,
        )

    def phase(
        self, state: TrainState, collector: Collector, clock: Stopwatch, *,
        another: bool = False, seen: LastPass | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """One phase: rollout, experience, learning. Returns its metrics. `another` says that one
        follows; `seen` is given what histograms are made of."""
        state.phase += 1
        actors, lap = collector.actors, Stopwatch()
        with state.policy.working():
            with clock("rollout"), lap("rollout"):
                rollout = collector.collect(state, lap, another=another)
                experience = self.build_experience(rollout)
            rates = learning_rates(state.optimizer)
            with clock("learn"), lap("learn"):
                steps = read_metrics(
                    self.learn(
                        state,
                        experience,
                        actors.reference,
                        temperature=actors.sampler.temperature,
                        seen=seen,
                    )
                )
                check_finite(steps, state.phase)
                state.scheduler.step()
        seconds = lap.seconds["rollout"] + lap.seconds["learn"]
        return {
            **rollout_metrics(experience, truncates=actors.sampler.truncates),
            **mean_metrics(steps),
            **{f"lr/{name}": rate for name, rate in rates.items()},
            **{f"time/{name}_s": value for name, value in lap.seconds.items()},
            "time/tokens_per_s": rollout.completions.mask.sum().item() / seconds,
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
        seen: LastPass | None = None,
    ) -> Iterator[Mapping[str, Tensor]]:
        """The optimizer steps of one phase; yields the metrics of each."""
        layout = Layout.of(experience.rollout.completions, whole=state.policy.is_compiled)
        for i in range(self.batches_per_learning_phase):
            noted = seen if i + 1 == self.batches_per_learning_phase else None
            order = torch.randperm(self.batch_size, generator=state.minibatch_generator)
            for index in order.split(self.minibatch_size):
                minibatch = self._whitened(experience[index])
                state.optimizer.zero_grad(set_to_none=False)
                metrics = self.backward(
                    state, minibatch, reference, temperature=temperature, layout=layout[index],
                    seen=noted,
                )  # fmt: skip
                norms = clip_gradients(state.optimizer, self.max_grad_norm)
                state.optimizer.step()
                state.policy.weights_changed()
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
        layout: Layout | None = None,
        seen: LastPass | None = None,
    ) -> Mapping[str, Tensor]:
        """Adds a minibatch's gradients, a micro-batch at a time, and returns its metrics. Each
        micro-batch counts as much as it has real tokens, so that its size changes memory alone."""
        layout = layout or Layout.of(minibatch.rollout.completions)
        rows = torch.arange(len(layout.mask))
        metrics: dict[str, Tensor] = {}
        for index in rows.split(self.micro_batch_size or len(rows)):
            whole = len(index) == len(rows)
            micro, part = (minibatch, layout) if whole else (minibatch[index], layout[index])
            share = float(part.mask.sum() / layout.mask.sum())
            output = self.loss(state.policy, reference, micro, temperature=temperature, layout=part)
            (share * output.loss).backward()
            if seen is not None:
                seen.add(output.logprobs, micro)
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + share * value
        return metrics

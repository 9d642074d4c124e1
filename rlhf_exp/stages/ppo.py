"""PPO with a KL penalty to a frozen reference, on completions of a policy with a value head.

A phase is one rollout and several passes of learning over it. Everything that a restart would need
is in TrainState; everything that a user sets is a field of PPO.
"""

import logging
from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import model_validator

from rlhf_exp.models.hub import locate_model
from rlhf_exp.models.interventions import NO_INTERVENTION, Intervention
from rlhf_exp.models.loading import ModelSettings, Pretrained
from rlhf_exp.models.reference import (
    ReferenceSettings,
    compute_reference_in,
    resident_memory,
)
from rlhf_exp.models.saving import save_policy
from rlhf_exp.rewards.attempts import Patience
from rlhf_exp.rewards.protocol import Reward
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.settings import Count, Fingerprinted, Index, NonNegative, Positive, settings
from rlhf_exp.stages.actors import Actors, check_frozen, fingerprints, frozen_hash, load_actors
from rlhf_exp.stages.collecting import SCORING, Collector
from rlhf_exp.stages.evaluation import (
    ANSWER_METRICS,
    METRICS,
    brief,
    evaluate,
    present,
    read_evaluations,
)
from rlhf_exp.stages.histograms import LastPass
from rlhf_exp.stages.learning import Learning
from rlhf_exp.stages.saved import check_saved_policy
from rlhf_exp.stages.train_state import TrainState
from rlhf_exp.tasks.protocol import AnswerTask, Task
from rlhf_exp.training.context import Context
from rlhf_exp.training.memory import explaining_memory
from rlhf_exp.training.metrics import read_metrics, rollout_metrics
from rlhf_exp.training.optim import AdamWSettings, Schedule, check_schedule, learning_rates
from rlhf_exp.training.precision import Dtype, compute_dtype
from rlhf_exp.training.progress import Progress
from rlhf_exp.training.saver import Saver, Together
from rlhf_exp.training.timing import Stopwatch
from rlhf_exp.types import Experience

log = logging.getLogger(__name__)

LOADING = ("choose a smaller model", "keep no second one, with reference=shared_trunk or lora")
EVALUATING = ("lower sampler.gen_len", "lower stage.eval_samples", *SCORING)
TRUNCATION_NOTE = (
    "top_k/top_p: samples come from a truncated distribution, while log-probs, KL and entropy are"
    " the policy's own; sample/kept_mass is its mass on what is kept"
)


@settings
class PPO(Learning):
    """Hyperparameters of the loop, beside those of learning."""

    total_phases: Count = 100
    missing_eos_penalty: NonNegative | None = None
    on_reward_error: Literal["stop", "retry", "skip"] = "stop"
    reward_retries: Index = 3
    reward_retry_wait_s: NonNegative = 1.0
    reward_timeout_s: Positive | None = 1800.0
    rollout_batch_size: Count | None = None
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
    def patience(self) -> Patience:
        """What is borne of a reward."""
        retries = 0 if self.on_reward_error == "stop" else self.reward_retries
        return Patience(
            retries=retries, wait_s=self.reward_retry_wait_s, timeout_s=self.reward_timeout_s
        )

    def check(
        self,
        *,
        task: Task,
        model: ModelSettings,
        reference: ReferenceSettings,
        reward: Reward,
        sampler: Sampler,
        schedule: Schedule,
        intervention: Intervention = NO_INTERVENTION,
        **_: Any,
    ) -> list[str]:
        """What is wrong between this stage and its parts. Raises ConfigError for a part whose files
        are missing or malformed."""
        for part in (task, reward, intervention):
            if isinstance(part, Fingerprinted):
                part.fingerprint()
        if isinstance(model, Pretrained):
            locate_model(model.base_model)  # not its hash, for which all weights are read
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

    def metric_names(self, *, task: Task, **_: Any) -> tuple[str, ...]:
        """The names of the metrics in the result."""
        return METRICS + ANSWER_METRICS if isinstance(task, AnswerTask) else METRICS

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
        intervention: Intervention = NO_INTERVENTION,
    ) -> dict[str, Any]:
        """Trains, evaluates before, between and after, saves the policy; returns the result.

        Raises ConfigError for parts that do not fit each other, before anything is written,
        TrainingError naming the phase if the loss or a gradient is not finite, if memory runs out
        and if the reference has changed, and RewardError if a score is not finite.
        """
        clock = Stopwatch()
        with clock("load"), explaining_memory("loading", LOADING):
            actors = load_actors(context, task, model, reward, sampler, reference, intervention)
            self.prepare(actors)
            frozen = frozen_hash(actors)
            files = {"task": task, "model": model, "intervention": intervention}
            inputs = fingerprints(actors.policy.language_model, **files)
            inputs["reference"] = actors.reference_hash
            state = TrainState.start(
                actors.policy, optimizer, schedule, actors.train_prompts,
                batch_size=self.batch_size, total_phases=self.total_phases, seed=context.seed,
                inputs=inputs,
            )  # fmt: skip
            clock.seconds = state.seconds  # those of a resumed run go on
            collector = self.collector(actors)
            both = Together(loop=state, ahead=collector)
            saver = Saver(context, both, every=self.checkpoint_every, optimizer=state.optimizer)
            if saver.restore():
                log.info("going on after phase %d", state.phase)
                self.reconsider(state)
        context.folder.start()
        log.info("%s", memory := resident_memory(actors.policy, actors.reference))
        with clock("compile"):
            self.warm_up(actors)
        if sampler.truncates:
            log.info(TRUNCATION_NOTE)
        self._train(context, state, collector, saver, clock)
        with clock("save"):
            check_frozen(actors, frozen)
            path = save_policy(actors.policy, context.folder.path / "model")
            check_saved_policy(actors.policy, path)
        before, after = read_evaluations(context.folder)
        present(context, before, after)
        return {
            "before": before.metrics,
            "after": after.metrics,
            "stopped": state.stopped,
            "reference_sha256": actors.reference_hash,
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
                states = policy.hidden_states(tokens, mask if padded else None, prompt_len=width)
                states.sum().backward()
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
            while state.phase < self.total_phases and state.stopped is None:
                another = state.phase + 1 < self.total_phases
                seen = LastPass() if self._is_due(self.histograms_every, state.phase + 1) else None
                metrics = self.phase(state, collector, clock, another=another, seen=seen)
                context.folder.log(state.phase, metrics)
                if seen is not None and (found := seen.histograms()):
                    context.folder.log_histograms(state.phase, found)
                progress.advance(state.phase, metrics)
                is_last = not another or state.stopped is not None
                score, is_best = None, False
                if is_last or self._is_due(self.eval_every, state.phase):
                    score = self._evaluate(context, collector, state, clock)
                    is_best = state.note_evaluation(score)
                with clock("save"):
                    saver.step_done(state.phase, is_last=is_last, score=score, is_best=is_best)

    def _is_due(self, every: int | None, phase: int) -> bool:
        return every is not None and (phase % every == 0 or phase == self.total_phases)

    def _evaluate(
        self, context: Context, collector: Collector, state: TrainState, clock: Stopwatch
    ) -> float:
        """Evaluates, logs, and returns the mean score."""
        collector.wait_for_reward()
        actors, phase = collector.actors, state.phase
        explaining = explaining_memory(f"phase {phase}: evaluating", EVALUATING)
        with clock("evaluate"), actors.policy.working(), explaining:
            result = evaluate(
                actors.policy,
                actors.reference,
                collector.reward,
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
            # Without a timeout the reward is called on the main thread, beside nothing else.
            overlap=actors.policy.device.type == "cuda" and self.reward_timeout_s is not None,
            ahead=self.async_reward,
            patience=self.patience,
            skip_unscored=self.on_reward_error == "skip",
        )

    def phase(
        self, state: TrainState, collector: Collector, clock: Stopwatch, *,
        another: bool = False, seen: LastPass | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """One phase: rollout, experience, learning. Returns its metrics. `another` says that one
        follows; `seen` is given what histograms are made of."""
        state.phase += 1
        actors, lap = collector.actors, Stopwatch()
        kl_coef, rates = self.kl_coef_of(state), learning_rates(state.optimizer)
        with state.policy.working():
            with clock("rollout"), lap("rollout"):
                rollout = collector.collect(state, lap, another=another)
                experience = self.build_experience(rollout, kl_coef=kl_coef)
            with clock("learn"), lap("learn"), explaining_memory(
                f"phase {state.phase}: learning", self.memory_knobs(actors)
            ):  # fmt: skip
                learned = self._learned(state, experience, actors, seen=seen)
                state.scheduler.step()
        metrics = rollout_metrics(experience, truncates=actors.sampler.truncates)
        metrics |= self.look(state, rollout, actors, metrics)
        self.settle(state, metrics)
        seconds = lap.seconds["rollout"] + lap.seconds["learn"]
        return {
            **metrics,
            "objective/kl_coef": kl_coef,
            **learned,
            "train/skipped_steps": float(state.skipped_steps),
            "train/skipped_rewards": float(state.skipped_rewards),
            **{f"lr/{name}": rate for name, rate in rates.items()},
            **{f"time/{name}_s": value for name, value in lap.seconds.items()},
            "time/tokens_per_s": rollout.completions.mask.sum().item() / seconds,
        }

    def _learned(
        self, state: TrainState, experience: Experience, actors: Actors, *, seen: LastPass | None
    ) -> dict[str, float]:
        """What learning came to; nothing is learned from a batch without scores."""
        if self.on_reward_error == "skip" and bool(experience.rollout.scores.isnan().any()):
            state.skipped_rewards += 1
            self.check_skipped(state)
            return self.nothing_learned(state)
        return self.sum_up(
            state,
            read_metrics(
                self.learn(
                    state,
                    experience,
                    actors.reference,
                    temperature=actors.sampler.temperature,
                    seen=seen,
                )
            ),
        )

"""The steps of rl/loop.py filled with the settings of a stage."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rl import loop
from rlhf_exp.rl.averaging import WeightAverage
from rlhf_exp.rl.collect import Rollouts, Scorer, missing_eos_penalty, sample
from rlhf_exp.rl.estimators import credit, token_rewards
from rlhf_exp.rl.histograms import HistogramCollector
from rlhf_exp.rl.learn import Minibatch, micro_batches, minibatches, optimizer_step
from rlhf_exp.rl.metrics import phase_metrics, read_metrics
from rlhf_exp.rl.phase_end import advance
from rlhf_exp.rl.phase_hook import PhaseHook, find_hook
from rlhf_exp.rl.ppo_settings import PPOSettings
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.measure import measure
from rlhf_exp.tasks.prompts import PromptStream
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.out_of_memory import explaining_memory
from rlhf_exp.training.schedules import Schedule
from rlhf_exp.training.seeding import make_generator
from rlhf_exp.types import Completions, Experience, Generation, Layout, Pass, PromptBatch, Rollout


def start(
    ppo: PPOSettings, setup: Setup, optimizer: AdamWSettings, schedule: Schedule, seed: int,
    inputs: Mapping[str, str],
) -> TrainState:  # fmt: skip
    """The state before the first phase."""
    policy, num_prompts = setup.policy, ppo.batch_size // ppo.samples_per_prompt
    base: nn.Module = policy.language_model
    if policy.value_trunk is not None:
        base = nn.ModuleList([base, policy.value_trunk.language_model])
    adamw = optimizer.build(base, policy.value_head)
    return TrainState(
        policy=policy, optimizer=adamw, inputs=inputs,
        scheduler=schedule.build(adamw, total_steps=ppo.total_phases),
        prompts=PromptStream(setup.train_prompts, num_prompts, make_generator(seed, "prompts")),
        sample_generator=make_generator(seed, "samples", policy.device),
        minibatch_generator=make_generator(seed, "minibatches"),
        average=WeightAverage(policy, ppo.average_weights) if ppo.average_weights else None,
    )  # fmt: skip


class Phases:
    """The steps of rl/loop.py with a stage's settings and with the code around them: the
    clock of the run and the lap of the phase, explanations of memory, rewards on a thread, skipped
    phases, histograms and guards."""

    def __init__(self, ppo: PPOSettings, setup: Setup, state: TrainState, clock: Stopwatch) -> None:
        self.ppo, self.setup, self.state, self.clock = ppo, setup, state, clock
        self.lap = Stopwatch()
        self.histograms = HistogramCollector()
        self.kl_coefficient = ppo.kl_coefficient
        self.hook: PhaseHook | None = None
        if ppo.on_phase is not None:
            self.hook = PhaseHook(
                name=ppo.on_phase, function=find_hook(ppo.on_phase), every=ppo.on_phase_every,
                total_phases=ppo.total_phases,
            )  # fmt: skip
        assert setup.score is not None  # a reward is among the parts
        self.scorer = Scorer(
            setup.score, ppo.guards, on_thread=ppo.compute.scores_on_thread(setup, ppo.guards),
            penalty=missing_eos_penalty(setup.policy.tokenizer, ppo.missing_eos_penalty),
        )  # fmt: skip
        collect = partial(
            loop.collect_rollout, state, sample=self.sample, score=self.score, measure=self.measure
        )
        self.rollouts = Rollouts(
            collect, setup.train_prompts,
            ahead=ppo.compute.async_reward, total_phases=ppo.total_phases,
        )  # fmt: skip
        self._rows = ppo.compute.rollout_batch_size or ppo.batch_size
        self._less = (f"lower stage.compute.rollout_batch_size (now {self._rows})",
                      "lower sampler.gen_len")  # fmt: skip

    def run(self, keep: Callable[[Mapping[str, float]], None]) -> None:
        """The next phase."""
        loop.run_phase(
            self.state, collect=self.collect, credit=self.credit, learn=self.learn,
            summarize=self.summarize, keep=keep,
            advance=partial(advance, self.state, self.ppo.guards, self.kl_coefficient),
        )  # fmt: skip

    def sample(self, prompts: PromptBatch, phase: int) -> Generation:
        """Step 1."""
        with self.lap("sample"), explaining_memory(f"phase {phase}: sampling", self._less):
            return sample(
                self.setup.sampler, self.setup.policy,
                prompts.repeated(self.ppo.samples_per_prompt), self.state.sample_generator,
                phase=phase, rows=self._rows,
            )  # fmt: skip

    def score(self, completions: Completions, phase: int) -> loop.PendingScores:
        """Step 2."""
        with self.lap("score"):
            scores = self.scorer(completions, phase)

        def wait() -> Tensor:
            with self.lap("score"):
                return scores()

        return wait

    def measure(self, generation: Generation, phase: int) -> Rollout:
        """Step 3; the scores are NaN until they are computed."""
        doing = f"phase {phase}: measuring the samples"
        unscored = generation.logprobs.new_full(generation.logprobs.shape[:1], math.nan)
        with self.lap("measure"), explaining_memory(doing, self._less):
            rollout = measure(
                self.setup.policy, self.setup.reference, generation, unscored,
                temperature=self.setup.sampler.temperature, rows=self._rows,
            )  # fmt: skip
            if self.setup.policy.value_trunk is None:
                return rollout
            return replace(rollout, values=sampled_values(self.setup.policy, rollout, self._rows))

    def collect(self, phase: int) -> Rollout:
        """Steps 1 to 3, a phase ahead with async_reward."""
        with self.clock("rollout"), self.lap("rollout"):
            return self.rollouts(phase)

    def credit(self, rollout: Rollout) -> Experience:
        """Step 4."""
        ppo, kl_coef = self.ppo, self.kl_coefficient.now(self.state)
        with self.clock("rollout"), self.lap("rollout"):
            rewards = token_rewards(
                rollout, kl_coef=kl_coef, kl_penalty=ppo.kl_penalty,
                normalize=ppo.normalize_reward,
            )  # fmt: skip
            return credit(ppo.estimator, rollout, rewards, self.state.credit_memory)

    def learn(self, experience: Experience) -> list[dict[str, float]]:
        """Step 5; nothing is learned from a batch without scores, or if all rows are left out."""
        guards, phase = self.ppo.guards, self.state.phase
        less = self.ppo.compute.less_memory(self.setup, minibatch=self.ppo.minibatch_size)
        explaining = explaining_memory(f"phase {phase}: learning", less)
        with self.clock("learn"), self.lap("learn"), explaining:
            if guards.on_reward_error == "skip" and bool(experience.rollout.scores.isnan().any()):
                self.state.skipped_rewards += 1
                return []
            if experience.num_learned == 0:
                return []
            return read_metrics(self.updates(experience))

    def updates(self, experience: Experience) -> Iterator[loop.Metrics]:
        """The metrics of each minibatch, one optimizer step after the other."""
        ppo, state = self.ppo, self.state
        kl_coef = self.kl_coefficient.now(state)
        self.histograms.expect(experience.num_learned)
        layout = Layout.of(experience.rollout.completions, whole=state.policy.is_compiled)

        def policy_pass(part: Minibatch) -> Pass:
            policy, rollout = self.setup.policy, part.experience.rollout
            new = policy.engine.learning_pass(
                rollout, self.setup.reference.head, part.layout,
                temperature=self.setup.sampler.temperature,
            )  # fmt: skip
            if policy.value_trunk is None:
                return new
            values = policy.completion_values(rollout.completions, part.layout)
            return new._replace(values=values)

        return loop.update_policy(
            state,
            experience,
            minibatches=partial(
                minibatches, layout=layout, generator=state.minibatch_generator,
                num_minibatches=ppo.num_minibatches, num_passes=ppo.batches_per_learning_phase,
                prepare=ppo.estimator.for_minibatch,
            ),
            micro_batches=partial(
                micro_batches, size=ppo.compute.micro_batch_size,
                aggregation=ppo.objective.aggregation,
            ),
            policy_pass=policy_pass,
            objective=self.histograms.watch(
                partial(ppo.objective, coefs=ppo.coefficients(kl_coef))
            ),
            optimizer_step=partial(
                optimizer_step, state, guards=ppo.guards, max_grad_norm=ppo.max_grad_norm
            ),
        )  # fmt: skip

    def summarize(self, experience: Experience, updates: loop.Updates) -> dict[str, float]:
        """The metrics of the phase, see `phase_metrics`, and the user's own."""
        metrics = phase_metrics(
            self.state, self.setup, self.ppo.guards, self.ppo.objective, self.kl_coefficient,
            self.lap, experience, updates, self.ppo.estimator.metrics(experience),
        )  # fmt: skip
        if self.hook is not None:
            with self.clock("on_phase"):
                metrics |= self.hook(self.setup.policy, self.state.phase, experience.rollout)
        return metrics


@torch.no_grad()
def sampled_values(policy: TransformerWithValueHead, rollout: Rollout, rows: int) -> Tensor:
    """The values [batch completion] of a rollout by a separate trunk, `rows` completions at a
    time."""
    completions = rollout.completions
    layout = Layout.of(completions)
    return torch.cat(
        [
            policy.completion_values(completions[index.to(policy.device)], layout[index])
            for index in torch.arange(len(layout.mask)).split(rows)
        ]
    )

"""PPO with a KL penalty to a frozen reference: its settings, and rl/loop.py run with them."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from pydantic import model_validator
from torch import Tensor

from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.models.finetune import Finetune
from rlhf_exp.models.interventions import NO_INTERVENTION, Intervention
from rlhf_exp.models.loading import ModelSettings, Pretrained
from rlhf_exp.models.reference import reference_hash, resident_memory
from rlhf_exp.models.saving import save_policy
from rlhf_exp.rewards.protocol import Reward
from rlhf_exp.rl import loop
from rlhf_exp.rl.collect import Rollouts, Scorer, missing_eos_penalty, sample
from rlhf_exp.rl.compute import Compute, warm_up
from rlhf_exp.rl.estimators import GAE, Estimator, credit, token_rewards
from rlhf_exp.rl.evaluation import metric_names, present, read_evaluations
from rlhf_exp.rl.guards import Guards, clear_stop_if_allowed
from rlhf_exp.rl.histograms import HistogramCollector
from rlhf_exp.rl.kl_coefficient import KLCoefficient
from rlhf_exp.rl.learn import Minibatch, micro_batches, minibatches, optimizer_step
from rlhf_exp.rl.metrics import phase_metrics, read_metrics
from rlhf_exp.rl.objectives import Coefficients, Objective, PPOClip
from rlhf_exp.rl.phase_end import Keeper, advance
from rlhf_exp.rl.setup import Setup, check_frozen, fingerprints, load_setup
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.measure import measure
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.runs.context import Context
from rlhf_exp.settings import Count, Fingerprinted, NonNegative, OpenFraction, Positive, settings
from rlhf_exp.stages.check_saved import check_saved_policy
from rlhf_exp.stages.protocol import Stage, StageResult
from rlhf_exp.tasks.prompts import PromptStream
from rlhf_exp.tasks.protocol import AnswerTask, Task
from rlhf_exp.tracking.progress import Progress
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.out_of_memory import explaining_memory
from rlhf_exp.training.saver import Saver
from rlhf_exp.training.schedules import Schedule, check_schedule
from rlhf_exp.training.seeding import make_generator
from rlhf_exp.types import Completions, Experience, Generation, Layout, Pass, PromptBatch, Rollout

log = logging.getLogger(__name__)

LOADING = ("choose a smaller model", "keep no second one, with finetune=last_layers or lora")
TRUNCATION_NOTE = (
    "top_k/top_p: samples come from a truncated distribution, while log-probs, KL and entropy are"
    " the policy's own; sample/kept_mass is its mass on what is kept"
)


@dataclass(frozen=True, kw_only=True)
class PPOParts:
    """The parts for PPO."""

    task: Task
    model: ModelSettings
    finetune: Finetune
    reward: Reward
    sampler: Sampler
    optimizer: AdamWSettings
    schedule: Schedule
    intervention: Intervention = NO_INTERVENTION


@settings
class PPO(Stage[PPOParts]):
    """The algorithm's settings. Objective = policy term - vf_coef value loss + ent_coef entropy
    - kl_coef exact KL, the last only with kl_penalty="loss"."""

    Parts = PPOParts

    total_phases: Count = 100
    """Phases; each is one rollout and learning from it."""
    batch_size: Count = 32
    """Completions a phase; a multiple of num_minibatches and samples_per_prompt."""
    samples_per_prompt: Count = 1
    """Completions sampled for each prompt, 1-64; they form a group."""
    num_minibatches: Count = 4
    """Optimizer steps a pass, 1-16."""
    batches_per_learning_phase: Count = 2
    """Passes over the rollout, 1-4."""
    clip_coef: OpenFraction = 0.2
    """The ratio is clipped to 1 +- this, 0.1-0.3."""
    vf_coef: NonNegative = 0.15
    """Weight of the value loss, 0.1-1; unused without values."""
    value_clip_coef: Positive | None = None
    """The value loss clips values to the rollout's +- this; null: no clipping."""
    ent_coef: NonNegative = 0.001
    """Weight of the entropy bonus (nats), 0-0.01."""
    kl_coef: NonNegative = 0.2
    """Weight of the KL to the reference (nats a token), 0.03-3."""
    kl_penalty: Literal["loss", "reward"] = "loss"
    """loss: exact KL in the loss; reward: -kl_coef (log p - log q) on each token's reward."""
    adaptive_kl_target: Positive | None = None
    """Target KL of a phase (nats a completion, 1-20; 6 in Ziegler et al. 2019), reached by adapting
    kl_coef; null: kl_coef is constant."""
    kl_horizon: Positive = 10000.0
    """kl_coef changes by at most 20 % over this many completions, 1000-100000."""
    normalize_reward: bool = True
    """Shifts and scales scores to mean 0 and standard deviation 1 over the batch."""
    missing_eos_penalty: NonNegative | None = None
    """Subtracted from the score of a completion that does not end with EOS, 0.5-2; null: none."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm over all parameters."""
    eval_every: Count = 25
    """Phases between evaluations."""
    eval_samples: Count = 512
    """Completions an evaluation."""
    histograms_every: Count | None = 25
    """Phases between histograms of advantages, ratios and token KL; null: none."""
    checkpoint_every: Count | None = 50
    """Phases between checkpoints, besides those at the best evaluation and at the end; null: only
    when asked to stop."""
    estimator: Estimator = GAE()
    """How rewards become advantages: stage/estimator=gae, one_step or leave_one_out."""
    objective: Objective = PPOClip()
    """What learning maximises: stage/objective=ppo_clip."""
    guards: Guards = Guards()
    """Limits on KL, steps that are not finite, and failing rewards."""
    compute: Compute = Compute()
    """Precision, compilation and memory."""

    @model_validator(mode="after")
    def _agrees(self) -> "PPO":
        for problem in _contradictions(self):
            raise ValueError(problem)
        return self

    @property
    def minibatch_size(self) -> int:
        """Completions per optimizer step."""
        return self.batch_size // self.num_minibatches

    def check(self, parts: PPOParts) -> list[str]:
        model, sampler = parts.model, parts.sampler
        for part in (parts.task, parts.reward, parts.intervention):
            if isinstance(part, Fingerprinted):
                part.fingerprint()
        if isinstance(model, Pretrained):
            model.locate()  # not its hash, which reads all weights
        problems = check_schedule(
            parts.schedule, total_steps=self.total_phases, field="stage.total_phases"
        )
        problems += parts.finetune.check(model)
        problems += self.compute.problems(model, sampler, parts.reward)
        if self.missing_eos_penalty is not None and not sampler.stop_at_eos:
            problems.append("stage.missing_eos_penalty needs sampler.stop_at_eos=true")
        if isinstance(parts.task, AnswerTask) and not sampler.stop_at_eos:
            problems.append("the task has exact answers, which end: set sampler.stop_at_eos=true")
        return problems

    def metric_names(self, parts: PPOParts) -> tuple[str, ...]:
        return metric_names(parts.task, parts.reward)

    def run(self, context: Context, parts: PPOParts) -> StageResult:
        """Trains, evaluates before, between and after, saves the policy; returns the result.

        Raises ConfigError for parts that do not fit each other, before anything is written,
        TrainingError naming the phase if the loss or a gradient is not finite, if memory runs out
        and if the reference has changed, and RewardError if a score is not finite.
        """
        clock = Stopwatch()
        with clock("load"), explaining_memory("loading", LOADING):
            setup = load_setup(
                context, parts.task, parts.model, parts.reward, parts.sampler, parts.finetune,
                intervention=parts.intervention, value_head=self.estimator.needs_values,
            )  # fmt: skip
            self.compute.prepare(setup)
            frozen = reference_hash(setup.reference, setup.policy)  # as passes use the weights
            files = {"task": parts.task, "model": parts.model, "intervention": parts.intervention}
            inputs = fingerprints(setup.policy.language_model, **files)
            inputs["finetune"] = setup.reference_hash
            state = start(self, setup, parts.optimizer, parts.schedule, context.seed, inputs)
            clock.seconds = state.seconds  # a resumed run adds to its seconds
            phases = Phases(self, setup, state, clock)
            saver = Saver(
                context, {"loop": state, "ahead": phases.rollouts},
                interval=self.checkpoint_every, optimizer=state.optimizer,
            )  # fmt: skip
            if saver.restore():
                log.info("going on after phase %d", state.phase)
                clear_stop_if_allowed(self.guards, state)
        context.folder.start()
        memory = resident_memory(setup.policy, setup.reference)
        log.info("%s", memory)
        with clock("compile"):
            warm_up(setup, rows=self.compute.micro_batch_size or self.minibatch_size)
        if parts.sampler.truncates:
            log.info(TRUNCATION_NOTE)
        train(self, context, phases, saver)
        with clock("save"):
            check_frozen(setup, frozen)
            path = save_policy(setup.policy, context.folder.model)
            check_saved_policy(setup.policy, path)
        before, after = read_evaluations(context.folder)
        present(context, before, after)
        return StageResult(
            before=before.metrics,
            after=after.metrics,
            seconds=clock.seconds,
            extra={"stopped": state.stopped, "reference_sha256": setup.reference_hash,
                   "memory": asdict(memory)},
        )  # fmt: skip


def _contradictions(ppo: PPO) -> Iterator[str]:
    for name in ("num_minibatches", "samples_per_prompt"):
        if ppo.batch_size % (count := getattr(ppo, name)):
            yield f"batch_size={ppo.batch_size} must be a multiple of {name}={count}"
    name, samples = type(ppo.estimator).__name__, ppo.samples_per_prompt
    if samples < (least := ppo.estimator.min_samples_per_prompt):
        yield f"samples_per_prompt={samples}: {name} needs at least {least}; set it {2 * least}"
    if ppo.value_clip_coef is not None and not ppo.estimator.needs_values:
        yield f"value_clip_coef={ppo.value_clip_coef:g}: {name} has no values; set it null"
    yield from ppo.compute.too_large(batch=ppo.batch_size, minibatch=ppo.minibatch_size)
    yield from _kl_coefficient(ppo).problems()


def _kl_coefficient(ppo: PPO) -> KLCoefficient:
    return KLCoefficient(
        start=ppo.kl_coef, target=ppo.adaptive_kl_target, horizon=ppo.kl_horizon,
        batch_size=ppo.batch_size,
    )  # fmt: skip


def start(
    ppo: PPO, setup: Setup, optimizer: AdamWSettings, schedule: Schedule, seed: int,
    inputs: Mapping[str, str],
) -> TrainState:  # fmt: skip
    """The state before the first phase."""
    policy, num_prompts = setup.policy, ppo.batch_size // ppo.samples_per_prompt
    adamw = optimizer.build(policy.language_model, policy.value_head)
    return TrainState(
        policy=policy, optimizer=adamw, inputs=inputs,
        scheduler=schedule.build(adamw, total_steps=ppo.total_phases),
        prompts=PromptStream(setup.train_prompts, num_prompts, make_generator(seed, "prompts")),
        sample_generator=make_generator(seed, "samples", policy.device),
        minibatch_generator=make_generator(seed, "minibatches"),
    )  # fmt: skip


def train(ppo: PPO, context: Context, phases: "Phases", saver: Saver) -> None:
    """Runs phases until all are done or a guard ends the run."""
    with saver.steps(), Progress(ppo.total_phases, unit="phase") as progress:
        keeper = Keeper(
            context=context, setup=phases.setup, state=phases.state, scorer=phases.scorer,
            saver=saver, progress=progress, histograms=phases.histograms, clock=phases.clock,
            total_phases=ppo.total_phases, eval_every=ppo.eval_every,
            eval_samples=ppo.eval_samples, histograms_every=ppo.histograms_every,
        )  # fmt: skip
        keeper.start()
        while phases.state.phase < ppo.total_phases and phases.state.stopped is None:
            phases.run(keeper)


class Phases:
    """The steps of rl/loop.py with a stage's settings and with the code around them: the
    clock of the run and the lap of the phase, explanations of memory, rewards on a thread, skipped
    phases, histograms and guards."""

    def __init__(self, ppo: PPO, setup: Setup, state: TrainState, clock: Stopwatch) -> None:
        self.ppo, self.setup, self.state, self.clock = ppo, setup, state, clock
        self.lap = Stopwatch()
        self.histograms = HistogramCollector(ppo.batch_size)
        self.kl_coefficient = _kl_coefficient(ppo)
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
            return measure(
                self.setup.policy, self.setup.reference, generation, unscored,
                temperature=self.setup.sampler.temperature, rows=self._rows,
            )  # fmt: skip

    def collect(self, phase: int) -> Rollout:
        """Steps 1 to 3, a phase ahead with async_reward."""
        with self.clock("rollout"), self.lap("rollout"):
            return self.rollouts(phase)

    def credit(self, rollout: Rollout) -> Experience:
        """Step 4."""
        ppo, kl_coef = self.ppo, self.kl_coefficient.now(self.state)
        with self.clock("rollout"), self.lap("rollout"):
            rewards = token_rewards(
                rollout,
                kl_coef=kl_coef if ppo.kl_penalty == "reward" else 0.0,
                normalize=ppo.normalize_reward,
            )
            return credit(ppo.estimator, rollout, rewards)

    def learn(self, experience: Experience) -> list[dict[str, float]]:
        """Step 5; nothing is learned from a batch without scores."""
        guards, phase = self.ppo.guards, self.state.phase
        less = self.ppo.compute.less_memory(self.setup, minibatch=self.ppo.minibatch_size)
        explaining = explaining_memory(f"phase {phase}: learning", less)
        with self.clock("learn"), self.lap("learn"), explaining:
            if guards.on_reward_error == "skip" and bool(experience.rollout.scores.isnan().any()):
                self.state.skipped_rewards += 1
                return []
            return read_metrics(self.updates(experience))

    def updates(self, experience: Experience) -> Iterator[loop.Metrics]:
        """The metrics of each minibatch, one optimizer step after the other."""
        ppo, state = self.ppo, self.state
        kl_coef = self.kl_coefficient.now(state)
        layout = Layout.of(experience.rollout.completions, whole=state.policy.is_compiled)

        def policy_pass(part: Minibatch) -> Pass:
            return self.setup.policy.engine.learning_pass(
                part.experience.rollout, self.setup.reference.head, part.layout,
                temperature=self.setup.sampler.temperature,
            )  # fmt: skip

        return loop.update_policy(
            state,
            experience,
            minibatches=partial(
                minibatches, layout=layout, generator=state.minibatch_generator,
                num_minibatches=ppo.num_minibatches, num_passes=ppo.batches_per_learning_phase,
                prepare=ppo.estimator.for_minibatch,
            ),
            micro_batches=partial(micro_batches, size=ppo.compute.micro_batch_size),
            policy_pass=policy_pass,
            objective=self.histograms.watch(
                partial(ppo.objective, coefs=coefficients(ppo, kl_coef))
            ),
            optimizer_step=partial(
                optimizer_step, state, guards=ppo.guards, max_grad_norm=ppo.max_grad_norm
            ),
        )  # fmt: skip

    def summarize(self, experience: Experience, updates: loop.Updates) -> dict[str, float]:
        """The metrics of the phase; see `phase_metrics`."""
        return phase_metrics(
            self.state, self.setup, self.ppo.guards, self.ppo.objective, self.kl_coefficient,
            self.lap, experience, updates,
        )  # fmt: skip


def coefficients(ppo: PPO, kl_coef: float) -> Coefficients:
    """The weights of the loss's terms, with `kl_coef` for the KL."""
    return Coefficients(
        clip_coef=ppo.clip_coef, vf_coef=ppo.vf_coef, value_clip_coef=ppo.value_clip_coef,
        ent_coef=ppo.ent_coef, kl_coef=kl_coef if ppo.kl_penalty == "loss" else 0.0,
    )  # fmt: skip

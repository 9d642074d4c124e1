"""PPO with a KL penalty to a frozen reference: its settings, and rl/loop.py run with them."""

import logging
from dataclasses import asdict, dataclass

from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.models.engines import ENGINES
from rlhf_exp.models.finetune import Finetune
from rlhf_exp.models.interventions import NO_INTERVENTION, Intervention
from rlhf_exp.models.loading import ModelSettings
from rlhf_exp.models.model_checks import must_be_causal
from rlhf_exp.models.reference import reference_hash, resident_memory
from rlhf_exp.models.saving import save_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.protocol import Reward
from rlhf_exp.rl import eval_text, limit
from rlhf_exp.rl.compute import warm_up
from rlhf_exp.rl.evaluation import metric_names, present, queue_curves, read_evaluations
from rlhf_exp.rl.guards import clear_stop_if_allowed
from rlhf_exp.rl.phase_end import Keeper
from rlhf_exp.rl.phase_hook import find_hook
from rlhf_exp.rl.phases import Phases, start
from rlhf_exp.rl.ppo_settings import PPOSettings
from rlhf_exp.rl.setup import check_frozen, fingerprints, load_setup
from rlhf_exp.rl.snapshots import DTYPES, Snapshots, due_phases, trained_entries
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.runs.context import Context
from rlhf_exp.runs.snapshots import remove_snapshots
from rlhf_exp.settings import Fingerprinted, Upstream, settings
from rlhf_exp.stages.check_saved import check_saved_policy
from rlhf_exp.stages.protocol import Stage, StageResult, upstream_artifact
from rlhf_exp.tasks.protocol import AnswerTask, Task
from rlhf_exp.tracking.progress import Progress
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.out_of_memory import explaining_memory
from rlhf_exp.training.saver import Saver
from rlhf_exp.training.schedules import Schedule, check_schedule

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
class PPO(PPOSettings, Stage[PPOParts]):
    """PPO, by the steps of rl/loop.py."""

    Parts = PPOParts

    def check(self, parts: PPOParts) -> list[str]:
        model, sampler = parts.model, parts.sampler
        for part in (parts.task, parts.reward, parts.intervention, self.text_file):
            if isinstance(part, Fingerprinted):
                part.fingerprint()
        if self.on_phase is not None:
            find_hook(self.on_phase)
        problems = must_be_causal(model) + check_schedule(
            parts.schedule, total_steps=self.total_phases, field="stage.total_phases"
        )
        problems += parts.finetune.check(model)
        problems += self.compute.problems(model, sampler, parts.reward)
        if self.value_model == "separate" and not ENGINES[model.engine].is_plain:
            problems.append("stage.value_model=separate needs model.engine=fast")
        if self.missing_eos_penalty is not None and not sampler.stop_at_eos:
            problems.append("stage.missing_eos_penalty needs sampler.stop_at_eos=true")
        if isinstance(parts.task, AnswerTask) and not sampler.stop_at_eos:
            problems.append("the task has exact answers, which end: set sampler.stop_at_eos=true")
        return problems

    def notes(self, parts: PPOParts, upstream: Upstream) -> list[str]:
        if self.snapshots is None:
            return []
        made = upstream_artifact(parts.model, upstream)
        model = parts.model if made is None else made.model
        num = len(due_phases(self.snapshots, self.total_phases))
        skeleton = model.skeleton() if isinstance(model, ModelSettings) else None
        if skeleton is None:
            return [f"{num} snapshots, whose size is known once the model is here"]
        entries = trained_entries(
            skeleton, parts.finetune.select, value_head=self.estimator.needs_values,
            separate_values=self.value_model == "separate",
        )  # fmt: skip
        size = entries * DTYPES[self.snapshot_dtype].itemsize
        # The vocabulary of a model from scratch is known once its tokenizer is built.
        about = "and its embeddings each, " if isinstance(model, Scratch) else "each, "
        return [f"{num} snapshots of {_mib(size)} {about}{_mib(num * size)} in all"]

    def metric_names(self, parts: PPOParts) -> tuple[str, ...]:
        of_limit = limit.METRICS if self.limit_samples else ()
        of_texts = eval_text.METRICS if self.eval_text else ()
        return (*metric_names(parts.task, parts.reward), *of_limit, *of_texts)

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
                separate_values=self.value_model == "separate", eval_text=self.text_file,
            )  # fmt: skip
            if self.value_detach:
                setup.policy.detach_values()
            self.compute.prepare(setup)
            frozen = reference_hash(setup.reference, setup.policy)  # as passes use the weights
            files = {"task": parts.task, "model": parts.model, "intervention": parts.intervention,
                     "eval_text": self.text_file}  # fmt: skip
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
                remove_snapshots(context.folder.path, after=state.phase)
        context.folder.start()
        memory = resident_memory(setup.policy, setup.reference)
        log.info("%s", memory)
        with clock("compile"):
            warm_up(setup, rows=self.compute.micro_batch_size or self.minibatch_size)
        if parts.sampler.truncates:
            log.info(TRUNCATION_NOTE)
        train(self, context, phases, saver)
        with clock("save"), state.evaluated_weights():
            check_frozen(setup, frozen)
            path = save_policy(setup.policy, context.folder.model)
            check_saved_policy(setup.policy, path)
        before, after = read_evaluations(context.folder)
        present(context, before, after)
        queue_curves(context)
        return StageResult(
            before=before.metrics,
            after=after.metrics,
            seconds=clock.seconds,
            extra={"stopped": state.stopped, "reference_sha256": setup.reference_hash,
                   "memory": asdict(memory)},
        )  # fmt: skip


def train(ppo: PPO, context: Context, phases: Phases, saver: Saver) -> None:
    """Runs phases until all are done or a guard ends the run."""
    snapshots = None
    if ppo.snapshots is not None:
        snapshots = Snapshots(
            folder=context.folder.path, phases=ppo.snapshots, dtype=ppo.snapshot_dtype
        )
    with saver.steps(), Progress(ppo.total_phases, unit="phase") as progress:
        keeper = Keeper(
            context=context, setup=phases.setup, state=phases.state, scorer=phases.scorer,
            saver=saver, progress=progress, histograms=phases.histograms, clock=phases.clock,
            total_phases=ppo.total_phases, eval_every=ppo.eval_every,
            eval_samples=ppo.eval_samples, histograms_every=ppo.histograms_every,
            limit_samples=ppo.limit_samples,
            snapshots=snapshots,
        )  # fmt: skip
        keeper.start()
        while phases.state.phase < ppo.total_phases and phases.state.stopped is None:
            phases.run(keeper)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"

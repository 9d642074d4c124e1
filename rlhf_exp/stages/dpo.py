"""Direct preference optimisation: a policy learns from preference pairs without a reward model."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import WithJsonSchema, model_validator

from rlhf_exp.functional.losses import dpo_loss, ipo_loss
from rlhf_exp.machine.precision import Dtype, autocast
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.models.finetune import Finetune
from rlhf_exp.models.loading import (
    ModelSettings,
    Pretrained,
)
from rlhf_exp.models.model_checks import must_be_causal, must_be_fast
from rlhf_exp.models.reference import Reference, resident_memory
from rlhf_exp.models.saving import save_policy
from rlhf_exp.rewards.attempts import CheckedReward
from rlhf_exp.rewards.protocol import ReadsPrompts, Reward
from rlhf_exp.rl.evaluation import evaluate, metric_names, present, read_evaluations
from rlhf_exp.rl.setup import Setup, check_frozen, fingerprints, fitting_prompts, load_setup
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.runs.context import Context
from rlhf_exp.runs.summary import describe
from rlhf_exp.settings import (
    BelowHalf,
    ChecksUpstream,
    ConfigError,
    Count,
    Fingerprinted,
    NonNegative,
    Positive,
    Upstream,
    settings,
)
from rlhf_exp.stages.check_saved import check_saved_policy
from rlhf_exp.stages.online_pairs import OnlinePairs, PairBatch
from rlhf_exp.stages.pair_encoding import check_tokens, encode_split
from rlhf_exp.stages.pair_logprobs import PairLogprobs, ReferencedPairs
from rlhf_exp.stages.protocol import Stage, StageResult
from rlhf_exp.tasks.batches import BatchStream, bucket_by_length
from rlhf_exp.tasks.pair_tokens import EncodedPair
from rlhf_exp.tasks.pairs import num_shared
from rlhf_exp.tasks.protocol import AnswerTask, PairTask, Task
from rlhf_exp.tracking.curves import queue_loss_plot
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.saver import Stateful
from rlhf_exp.training.schedules import Schedule
from rlhf_exp.training.seeding import make_generator
from rlhf_exp.training.supervised import Supervised, SupervisedState
from rlhf_exp.types import LossOutput

log = logging.getLogger(__name__)

NEEDS = "stage=dpo needs preference pairs: task=pairs task.path=FILE"
# Of each logged batch of pairs; of the held-out pairs with heldout/ before each name.
METRICS = ("loss/preference", "loss/sft", "rewards/chosen", "rewards/rejected", "rewards/margins",
           "rewards/accuracies", "logps/chosen", "logps/rejected")  # fmt: skip
HELD_OUT = ("heldout/loss", *(f"heldout/{name}" for name in METRICS))

# A protocol has no JSON schema of its own.
TaskOrNone = Annotated[
    Task | None, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]})
]


@dataclass(frozen=True, kw_only=True)
class DPOParts:
    """The parts for DPO. The sampler and the reward are for evaluations, and for new pairs."""

    task: PairTask = field(metadata={"needs": NEEDS})
    model: ModelSettings
    finetune: Finetune
    sampler: Sampler
    optimizer: AdamWSettings
    schedule: Schedule
    reward: Reward | None = None


@settings
class DPO(Supervised, Stage[DPOParts]):
    """Preference loss + sft_coef x the mean negative log-prob of the chosen answers' tokens.

    The reward of an answer is beta (log p(answer) - log q(answer)), q the frozen reference, the
    model as it was loaded. Log-probs are sums over the answer's tokens, also for IPO. The last
    weights are kept: held-out pairs measure them and choose nothing.
    """

    Parts = DPOParts

    loss: Literal["dpo", "ipo"] = "dpo"
    """dpo: -log sigmoid(margin); ipo: (margin / beta - 1 / (2 beta))^2. The margin is the reward of
    the chosen answer minus that of the rejected one."""
    beta: Positive = 0.1
    """Strength of the pull to the reference, 0.01-0.5."""
    label_smoothing: BelowHalf = 0.0
    """Assumed fraction of pairs in the wrong order, 0-0.3; only with loss=dpo."""
    sft_coef: NonNegative = 0.0
    """Weight of the chosen answers' negative log-prob (nats a token), 0-1."""
    epochs: Count = 1
    """Passes over the pairs."""
    batch_size: Count = 32
    """Pairs an update."""
    eval_every: Count | None = None
    """Updates between evaluations, besides those before and after training; null: none between."""
    eval_samples: Count = 512
    """Completions an evaluation."""
    eval_task: TaskOrNone = None
    """A task whose held-out prompts, and exact answers if it knows them, evaluations use; null: the
    prompts of the held-out pairs."""
    resample_every: Count | None = None
    """Updates between new pairs, which the policy samples to the training prompts and the reward
    orders (1: fully on-policy); null: the pairs of the task are learned."""
    dtype: Dtype = "fp32"
    """Dtype of forward passes: fp32, bf16; auto: bf16 if the device has instructions for it,
    which pays if d_model >= 256."""
    micro_batch_size: Count | None = None
    """Pairs a forward and backward pass; less memory, the same result; null: batch_size."""
    gradient_checkpointing: bool = False
    """Computes activations again in the backward pass; less memory, slower."""

    @model_validator(mode="after")
    def _fits_the_batch(self) -> "DPO":
        if (size := self.micro_batch_size or 0) > self.batch_size:
            raise ValueError(
                f"micro_batch_size={size} is above batch_size={self.batch_size}: lower it, or set"
                " it null"
            )
        return self

    @model_validator(mode="after")
    def _smooths_labels(self) -> "DPO":
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} is for loss=dpo: set it 0, or loss=dpo"
            )
        return self

    def check(self, parts: DPOParts) -> list[str]:
        for part in (parts.task, self.eval_task, parts.reward):
            if isinstance(part, Fingerprinted):
                part.fingerprint()
        problems = must_be_causal(parts.model)
        problems += must_be_fast(parts.model, stage="dpo") or parts.finetune.check(parts.model)
        if isinstance(self.eval_task, AnswerTask) and not parts.sampler.stop_at_eos:
            problems.append(
                "stage.eval_task has exact answers, which end: set sampler.stop_at_eos=true"
            )
        if self.resample_every is not None and parts.reward is None:
            problems.append(
                f"stage.resample_every={self.resample_every} needs a reward to order the answers:"
                " choose one: reward=..."
            )
        return problems

    def check_texts(self, parts: DPOParts) -> list[str]:
        train, held_out = parts.task.pair_split()
        problems = self.check_updates(parts.schedule, len(train))
        if not held_out:
            problems.append("task.path: no pairs are held out: give at least one to measure")
        if not problems and isinstance(parts.model, Pretrained):
            check_tokens(parts.model, parts.task, stage="dpo")
        return problems

    def check_upstream(self, parts: DPOParts, upstream: Upstream) -> list[str]:
        problems = super().check_upstream(parts, upstream)
        if isinstance(self.eval_task, ChecksUpstream):
            problems += self.eval_task.check_upstream(upstream)
        return problems

    def metric_names(self, parts: DPOParts) -> tuple[str, ...]:
        return (*metric_names(self.eval_task or parts.task, parts.reward), *HELD_OUT)

    def run(self, context: Context, parts: DPOParts) -> StageResult:
        """Trains, evaluates before, between and after, saves the policy; returns the result.

        Raises ConfigError for pairs that the model cannot read, before its weights are loaded, and
        TrainingError naming the update if a loss is not finite or if the reference has changed.
        """
        clock = Stopwatch()
        with clock("load"), self.explaining("loading", "set finetune=last_layers or lora"):
            if problems := self.check_texts(parts):
                raise ConfigError("\n".join(problems))
            setup = load_setup(
                context, self.eval_task or parts.task, parts.model, parts.reward, parts.sampler,
                parts.finetune, value_head=False,
            )  # fmt: skip
            if self.gradient_checkpointing:
                setup.policy.checkpoint_gradients()
            train, held_out_pairs = self._encoded(parts.task, setup)
            held_out = self._referenced(held_out_pairs, setup)
            batches, pair_batches = self._batches(context, parts, setup, train)
            network = setup.policy.language_model
            inputs = fingerprints(network, task=parts.task, model=parts.model)
            inputs["finetune"] = setup.reference_hash
            if self.eval_task is not None:
                inputs["stage.eval_task"] = self.eval_task.fingerprint()
        context.folder.start()
        memory = resident_memory(setup.policy, setup.reference)
        log.info("%s", memory)
        num_updates = self.num_updates(len(train))
        with clock("train"):
            adamw = parts.optimizer.build(network)
            state = SupervisedState(
                network=network,
                optimizer=adamw,
                scheduler=parts.schedule.build(adamw, total_steps=num_updates),
                batches=batches,
                inputs=inputs,
            )
            measure = _Evaluations(self, context, setup, held_out, last=num_updates)
            self.fit(
                context, state, self._losses(setup, pair_batches),
                num_updates=num_updates, measure=measure, knobs=self._less_memory(),
            )  # fmt: skip
        with clock("save"):
            check_frozen(setup, setup.reference_hash)
            path = save_policy(setup.policy, context.folder.model)
            check_saved_policy(setup.policy, path)
        before, after = read_evaluations(context.folder)
        present(context, before, after)
        queue_loss_plot(context, title="DPO")
        return StageResult(
            before=before.metrics,
            after=after.metrics,
            seconds=clock.seconds,
            extra={"reference_sha256": setup.reference_hash, "memory": asdict(memory)},
        )

    def _encoded(self, task: PairTask, setup: Setup) -> tuple[list[EncodedPair], list[EncodedPair]]:
        """The pairs to train on and the held-out ones as tokens."""
        policy, split = setup.policy, task.pair_split()
        encoded = encode_split(policy.tokenizer, task, limit=policy.context_len, stage="dpo")
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        log.info("loss=%s: training %.2f M parameters on %d pairs; %d pairs held out",
                 self.loss, trained / 1e6, *map(len, encoded))  # fmt: skip
        if shared := num_shared(split):
            log.warning(
                "%d of %d held-out pairs have a prompt that is trained on too: what is reported is"
                " no measure of new prompts", shared, len(split.held_out),
            )  # fmt: skip
        return encoded

    def _referenced(self, pairs: list[EncodedPair], setup: Setup) -> ReferencedPairs:
        """The pairs with the reference's log-probs."""
        return ReferencedPairs(
            pairs, setup.reference,
            batch_size=self.micro_batch_size or self.batch_size, dtype=self.dtype,
            device=setup.policy.device,
        )  # fmt: skip

    def _less_memory(self) -> list[str]:
        """Settings that reduce the memory of learning, as advice."""
        size, knobs = self.micro_batch_size or self.batch_size, []
        if size > 1:
            knobs.append(f"set stage.micro_batch_size below {size}")
        if not self.gradient_checkpointing:
            knobs.append("set stage.gradient_checkpointing=true")
        return knobs

    def _batches(
        self, context: Context, parts: DPOParts, setup: Setup, pairs: list[EncodedPair]
    ) -> tuple[Stateful, Iterator[PairBatch]]:
        """What holds the state of the batches, and training batches of the task's pairs or of new
        ones."""
        if self.resample_every is None:
            train = self._referenced(pairs, setup)
            generator = make_generator(context.seed, "minibatches")
            stream = BatchStream(bucket_by_length, train.lengths, self.batch_size, generator)
            return stream, ((train, index) for index in stream)
        prompts = fitting_prompts(
            setup.policy, parts.task, parts.task.train_prompts(), parts.sampler
        )
        if isinstance(parts.reward, ReadsPrompts):
            parts.reward.check_prompts(prompts.texts)
        online = OnlinePairs(
            setup, prompts,
            batch_size=self.batch_size, num_batches=self.resample_every, dtype=self.dtype,
            pass_size=self.micro_batch_size, seed=context.seed, log=context.folder.log,
        )  # fmt: skip
        return online, online

    def _losses(self, setup: Setup, batches: Iterator[PairBatch]) -> Iterator[Iterator[LossOutput]]:
        for pairs, index in batches:
            yield self.loss_parts(setup.policy, pairs, index)

    def loss_parts(
        self, policy: Reference, pairs: ReferencedPairs, index: Sequence[int]
    ) -> Iterator[LossOutput]:
        """Yields the loss of the pairs at `index`, `micro_batch_size` pairs at a time; losses and
        metrics are weighted, so that their sums are those of all pairs at once."""
        size, num_tokens = self.micro_batch_size or len(index), pairs.num_chosen_tokens(index)
        for start in range(0, len(index), size):
            part = index[start : start + size]
            share = len(part) / len(index)
            output = self.loss_output(
                pairs.logprobs(policy, part), pairs.reference(part), num_tokens=share * num_tokens
            )
            metrics = {name: share * value for name, value in output.metrics.items()}
            yield LossOutput(loss=share * output.loss, metrics=metrics)

    def loss_output(
        self, policy: PairLogprobs, reference: PairLogprobs, *, num_tokens: float | int
    ) -> LossOutput:
        """The loss of pairs, and `METRICS`. The sum of the chosen answers' log-probs is divided by
        `num_tokens`, the number of their tokens; of a part of a batch, by its share of the
        batch's."""
        if self.loss == "ipo":
            preference = ipo_loss(*policy, *reference, beta=self.beta)
        else:
            smoothing = self.label_smoothing
            preference = dpo_loss(*policy, *reference, beta=self.beta, label_smoothing=smoothing)
        sft = -policy.chosen.sum() / num_tokens
        chosen, rejected = (
            self.beta * (logprobs.detach() - ref_logprobs)
            for logprobs, ref_logprobs in zip(policy, reference, strict=True)
        )
        wins, ties = (chosen > rejected).float(), (chosen == rejected).float()
        values = (
            preference.detach(), sft.detach(), chosen.mean(), rejected.mean(),
            (chosen - rejected).mean(), (wins + ties / 2).mean(),
            policy.chosen.detach().mean(), policy.rejected.detach().mean(),
        )  # fmt: skip
        return LossOutput(
            loss=preference + self.sft_coef * sft,
            metrics=dict(zip(METRICS, values, strict=True)),
        )


class _Evaluations:
    """Measures the policy on the held-out pairs and by fresh samples, if an evaluation is due."""

    def __init__(
        self, stage: DPO, context: Context, setup: Setup, held_out: ReferencedPairs, *, last: int
    ) -> None:
        self._stage, self._context, self._setup = stage, context, setup
        self._held_out, self._last = held_out, last
        self._reward = None if setup.score is None else CheckedReward(setup.score)

    def __call__(self, update: int) -> None:
        interval = self._stage.eval_every
        is_due = interval is not None and update % interval == 0
        if not (is_due or update in (0, self._last)):
            return
        stage, setup, folder = self._stage, self._setup, self._context.folder
        less = "lower sampler.gen_len", "lower stage.eval_samples"
        with (
            stage.explaining(f"update {update}: evaluating", *less),
            autocast(stage.dtype, setup.policy.device),
        ):
            result = evaluate(
                setup, self._reward,
                num_samples=stage.eval_samples, seed=self._context.seed, phase=update,
            )  # fmt: skip
            metrics = self._of_pairs() | result.metrics
        folder.log(update, metrics)
        folder.log_samples(update, result.samples)
        log.info("evaluation at update %d: %s", update, describe(metrics))

    @torch.no_grad()
    def _of_pairs(self) -> dict[str, float]:
        pairs = self._held_out
        index = range(len(pairs))
        output = self._stage.loss_output(
            pairs.all_logprobs(self._setup.policy),
            pairs.reference(index),
            num_tokens=pairs.num_chosen_tokens(index),
        )
        metrics = {"heldout/loss": output.loss.item()}
        return metrics | {f"heldout/{name}": v.item() for name, v in output.metrics.items()}

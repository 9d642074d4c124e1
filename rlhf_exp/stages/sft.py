"""Supervised training of a language model on a task's texts (pretraining from nothing) or on its
demonstrations (fine-tuning on answers to prompts)."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import model_validator

from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.machine.precision import Dtype, autocast, fp32_logits
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.models.cache import context_len
from rlhf_exp.models.fast_paths import supports_packing, with_fast_paths
from rlhf_exp.models.loading import ModelSettings
from rlhf_exp.models.model_checks import must_be_causal, must_be_plain
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rl.setup import fingerprints
from rlhf_exp.runs.context import Context
from rlhf_exp.runs.summary import describe
from rlhf_exp.settings import ConfigError, Count, OpenFraction, Positive, settings
from rlhf_exp.stages.check_saved import check_saved_language_model
from rlhf_exp.stages.held_out import GREEDY_EXACT, PERPLEXITY, HeldOut, next_token_loss
from rlhf_exp.stages.protocol import Stage, StageResult
from rlhf_exp.tasks.batches import BatchStream, bucket_by_length, shuffle_batches
from rlhf_exp.tasks.encoding import tokenizer_factory
from rlhf_exp.tasks.examples import (
    Example,
    encode_demonstrations,
    encode_texts,
    pack,
    pad,
)
from rlhf_exp.tasks.protocol import AnswerTask, CorpusTask, DemonstrationTask, Split, Task
from rlhf_exp.tracking.curves import queue_loss_plot
from rlhf_exp.training.early_stopping import EXACT, LOSS, EarlyStopping
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import Schedule
from rlhf_exp.training.seeding import make_generator, stream_seed
from rlhf_exp.training.supervised import Supervised, SupervisedState

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SFTParts:
    """The parts for fine-tuning."""

    task: Task
    model: ModelSettings
    optimizer: AdamWSettings
    schedule: Schedule


@settings
class SFT(Supervised, Stage[SFTParts]):
    """Next-token prediction over whole texts, or over the answers of demonstrations.

    With eval_every the model is measured as it trains and the best one is kept: by the exact-match
    rate of answers sampled at temperature 1 if the task knows exact answers, else by the held-out
    loss. Training ends at the first measured exact-match rate of at least stop_at.
    """

    Parts = SFTParts

    data: Literal["texts", "demonstrations"] = "texts"
    """texts: every token is learned; demonstrations: only the answers."""
    layout: Literal["pad", "pack"] = "pad"
    """pad: a text a row, like lengths together; pack: several a row, any lengths together."""
    max_updates: Count | None = None
    """Most updates; null: all epochs."""
    max_seconds: Positive | None = None
    """Most seconds of training; null: no limit. With a limit, runs differ by machine."""
    eval_every: Count | None = None
    """Updates between measurements; the best model is kept; null: the last is."""
    eval_samples: Count = 512
    """Held-out examples a measurement."""
    stop_at: OpenFraction | None = None
    """Ends at this exact-match rate of sampled held-out answers, 0-1."""
    dtype: Dtype = "fp32"
    """Dtype of forward passes: fp32, bf16; auto: bf16 if the device has instructions for it,
    which pays if d_model >= 256."""

    @model_validator(mode="after")
    def _can_stop(self) -> "SFT":
        if self.stop_at is not None and (self.eval_every is None or self.data == "texts"):
            raise ValueError(
                f"stop_at={self.stop_at} is a measured exact-match rate: set eval_every to the"
                " updates between measurements, and data=demonstrations"
            )
        return self

    def num_updates(self, num_examples: int) -> int:
        """Updates in all epochs, at most max_updates."""
        updates = super().num_updates(num_examples)
        return updates if self.max_updates is None else min(updates, self.max_updates)

    def check(self, parts: SFTParts) -> list[str]:
        problems, task = [], parts.task
        if self.data == "texts" and not isinstance(task, CorpusTask):
            problems.append(
                "stage=sft needs a task with texts: task=reviews, task=labelled_text or"
                " task=arithmetic"
            )
        if self.data == "demonstrations" and not isinstance(task, DemonstrationTask):
            problems.append("stage.data=demonstrations needs a task with answers: task=arithmetic")
        if self.stop_at is not None and not isinstance(task, AnswerTask):
            problems.append("stage.stop_at needs a task with exact answers: task=arithmetic")
        problems += must_be_causal(parts.model)
        return problems + must_be_plain(parts.model, stage="sft")

    def check_texts(self, parts: SFTParts) -> list[str]:
        return self.check_updates(parts.schedule, len(self._split(parts.task).train))

    def metric_names(self, parts: SFTParts) -> tuple[str, ...]:
        exact = isinstance(parts.task, AnswerTask) and self.data == "demonstrations"
        return (LOSS, PERPLEXITY, EXACT, GREEDY_EXACT) if exact else (LOSS, PERPLEXITY)

    def run(self, context: Context, parts: SFTParts) -> StageResult:
        """Trains, measures on held-out texts, saves model and tokenizer; returns the result.

        The phase of its metrics is the number of updates. Raises TrainingError naming the update
        if the loss is not finite.
        """
        clock, task = Stopwatch(), parts.task
        with clock("load"), self.explaining("loading"):
            policy = self._load(context, task, parts.model)
            network = policy.language_model
            split = self._split(task)
            train, held_out = (self._encode(task, policy, examples) for examples in split)
            measured = HeldOut(
                policy, held_out,
                num_samples=self.eval_samples, chooses=self.eval_every is not None,
                batch_size=self.batch_size, seed=context.seed,
            )  # fmt: skip
            if isinstance(task, AnswerTask) and self.data == "demonstrations":
                measured.with_answers(task, [d.prompt for d in split.held_out])
        context.folder.start()
        log.info(
            "training %.2f M parameters on %d examples, %d tokens; %d examples held out",
            network.num_parameters() / 1e6, len(train), sum(map(len, train)), len(held_out),
        )  # fmt: skip
        num_updates = self.num_updates(len(train))
        with clock("train"):
            adamw = parts.optimizer.build(network)
            early_stopping = EarlyStopping(
                context, network, measured.measure,
                eval_every=self.eval_every, stop_at=self.stop_at, max_seconds=self.max_seconds,
            )  # fmt: skip
            network.train()
            batches = self.batches(context, train)
            state = SupervisedState(
                network=network,
                optimizer=adamw,
                scheduler=parts.schedule.build(adamw, total_steps=num_updates),
                batches=batches,
                early_stopping=early_stopping,
                inputs=fingerprints(network, task=task, model=parts.model),
            )
            losses = self.losses(network, train, batches)
            self.fit(context, state, losses, num_updates=num_updates)
        with clock("evaluate"), self.explaining("evaluating"):
            early_stopping.restore_best(state.update)
            metrics = measured.final()
        context.folder.log(state.update, metrics)
        log.info("%s", describe(metrics))
        with clock("save"):
            network.save_pretrained(context.folder.model)
            policy.tokenizer.save_pretrained(context.folder.model)
            check_saved_language_model(network, context.folder.model)
        queue_loss_plot(context, title="language model")
        return StageResult(after=metrics, seconds=clock.seconds)

    def _load(self, context: Context, task: Task, model: ModelSettings) -> TransformerWithValueHead:
        network, tokenizer = model.language_model(
            tokenizer_factory(task), seed=stream_seed(context.seed, "model")
        )
        if tokenizer.eos_token_id is None:
            raise ConfigError("stage=sft needs a tokenizer with an EOS token")
        policy = with_fast_paths(TransformerWithValueHead(network.to(context.device), tokenizer))
        if self.layout == "pack" and not supports_packing(policy):
            raise ConfigError(
                f"stage.layout=pack: examples in one row would see each other in"
                f" {type(network).__name__}; set stage.layout=pad"
            )
        return policy

    def _split(self, task: Any) -> Split[Any]:
        return task.language_split() if self.data == "texts" else task.demonstration_split()

    def _encode(
        self, task: Task, policy: TransformerWithValueHead, examples: Sequence[Any]
    ) -> list[Example]:
        tokenizer, limit = policy.tokenizer, policy.context_len
        if self.data == "texts":
            return encode_texts(tokenizer, examples, limit=limit)
        return encode_demonstrations(tokenizer, examples, prepend_bos=task.prepend_bos, limit=limit)

    def batches(self, context: Context, examples: Sequence[Example]) -> BatchStream:
        """Training batches in random order, formed for `layout`."""
        # Padding needs batches of texts of similar length; packing does not.
        draw_epoch = bucket_by_length if self.layout == "pad" else shuffle_batches
        generator = make_generator(context.seed, "minibatches")
        return BatchStream(draw_epoch, [*map(len, examples)], self.batch_size, generator)

    def losses(
        self, network: PreTrainedModel, examples: Sequence[Example], batches: BatchStream
    ) -> Iterator[torch.Tensor]:
        """The loss of each batch, computed lazily."""
        limit = context_len(network)
        for index in batches:
            chosen = [examples[i] for i in index]
            batch = pad(chosen) if self.layout == "pad" else pack(chosen, limit=limit)
            head = network.get_output_embeddings()
            with autocast(self.dtype, network.device), fp32_logits(head):
                loss = next_token_loss(network, batch)
            yield loss

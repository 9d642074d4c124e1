"""Supervised training of a language model on a task's texts: pretraining from nothing, or
fine-tuning."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase
from rlhf_exp.models.loading import ModelSettings
from rlhf_exp.settings import ConfigError, Count, Positive, settings
from rlhf_exp.tasks.batches import length_bucketed, pad_right
from rlhf_exp.tasks.protocol import CorpusTask, LabelledText
from rlhf_exp.training.context import Context
from rlhf_exp.training.optim import AdamWSettings, Schedule, check_schedule
from rlhf_exp.training.seeding import stream, stream_seed
from rlhf_exp.training.supervised import fit
from rlhf_exp.training.timing import Stopwatch

log = logging.getLogger(__name__)

IGNORED = -100  # the label that transformers leaves out of the loss


@settings
class SFT:
    """Next-token prediction over whole texts, BOS before and EOS after each."""

    epochs: Count = 1
    batch_size: Count = 64
    max_grad_norm: Positive = 1.0
    log_every: Count = 50

    def check(self, *, task: Any, model: ModelSettings, **_: Any) -> list[str]:
        """What is wrong between this stage and its parts."""
        problems = [] if isinstance(task, CorpusTask) else [
            "stage=sft needs a task with texts: task=reviews or task=labelled_text"
        ]  # fmt: skip
        if model.engine != "fast":
            problems.append(
                "model.engine=hooked is for stage=ppo; stage=sft trains with engine=fast"
            )
        return problems

    def check_texts(self, *, task: CorpusTask, schedule: Schedule, **_: Any) -> list[str]:
        """What is wrong between the schedule and the number of updates that the texts give."""
        updates = self._num_updates(len(task.language_split().train))
        field = "the number of updates (stage.epochs x texts / stage.batch_size)"
        return check_schedule(schedule, total_steps=updates, field=field)

    def run(
        self,
        context: Context,
        *,
        task: CorpusTask,
        model: ModelSettings,
        optimizer: AdamWSettings,
        schedule: Schedule,
    ) -> dict[str, Any]:
        """Trains, measures the held-out loss, saves model and tokenizer; returns the result.

        The phase of its metrics is the number of updates. Raises TrainingError naming the update
        if the loss is not finite.
        """
        clock = Stopwatch()
        with clock("load"):
            network, tokenizer = model.language_model(
                task.build_tokenizer, seed=stream_seed(context.seed, "model")
            )
            if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
                raise ConfigError("stage=sft needs a tokenizer with BOS and EOS tokens")
            limit = int(network.config.max_position_embeddings)
            split = task.language_split()
            train = encode_texts(tokenizer, split.train, limit=limit)
            held_out = encode_texts(tokenizer, split.held_out, limit=limit)
            network.to(context.device).train()
            num_updates = self._num_updates(len(train))
        context.folder.start()
        log.info(
            "training %.2f M parameters on %d texts, %d tokens; %d texts held out",
            network.num_parameters() / 1e6, len(train), sum(map(len, train)), len(held_out),
        )  # fmt: skip
        with clock("train"):
            adamw = optimizer.build(network)
            fit(
                context,
                self._losses(network, train, stream(context.seed, "minibatches")),
                adamw,
                schedule.build(adamw, total_steps=num_updates),
                num_updates=num_updates,
                max_grad_norm=self.max_grad_norm,
                log_every=self.log_every,
            )
        with clock("evaluate"):
            loss = held_out_loss(network, held_out, batch_size=self.batch_size)
        metrics = {"heldout/loss": loss, "heldout/perplexity": math.exp(loss)}
        context.folder.log(num_updates, metrics)
        log.info("held-out loss %.3f nats a token, perplexity %.1f", loss, math.exp(loss))
        with clock("save"):
            network.save_pretrained(context.folder.path / "model")
            tokenizer.save_pretrained(context.folder.path / "model")
        return {"after": metrics, "seconds": clock.seconds}

    def _num_updates(self, num_texts: int) -> int:
        return self.epochs * math.ceil(num_texts / self.batch_size)

    def _losses(
        self, network: PreTrainedModel, rows: Sequence[list[int]], generator: torch.Generator
    ) -> Iterator[torch.Tensor]:
        while True:
            for index in length_bucketed([*map(len, rows)], self.batch_size, generator):
                yield next_token_loss(network, [rows[i] for i in index])


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[LabelledText], *, limit: int
) -> list[list[int]]:
    """BOS, the text's tokens, EOS; texts longer than `limit` tokens are cut, and their number is
    logged."""
    encoded = tokenizer([text.text for text in texts], add_special_tokens=False)["input_ids"]
    too_long = sum(len(ids) > limit - 2 for ids in encoded)
    if too_long:
        log.info("%d of %d texts are cut to %d tokens", too_long, len(encoded), limit)
    return [[tokenizer.bos_token_id, *ids[: limit - 2], tokenizer.eos_token_id] for ids in encoded]


def next_token_loss(network: PreTrainedModel, rows: Sequence[list[int]]) -> torch.Tensor:
    """Mean cross-entropy over every token but each row's first, in nats.

    No mask is needed: rows are padded on the right, where causal attention never looks.
    """
    tokens = pad_right(rows, fill=0).to(network.device)
    labels = pad_right(rows, fill=IGNORED).to(network.device)
    return network(input_ids=tokens, labels=labels).loss


@torch.no_grad()
def held_out_loss(network: PreTrainedModel, rows: Sequence[list[int]], *, batch_size: int) -> float:
    """Mean cross-entropy a token, dropout off, every token weighing the same."""
    network.eval()
    total, count = 0.0, 0
    for i in range(0, len(rows), batch_size):
        batch = rows[i : i + batch_size]
        tokens = sum(map(len, batch)) - len(batch)
        total += next_token_loss(network, batch).item() * tokens
        count += tokens
    return total / count

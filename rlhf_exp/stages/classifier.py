"""Training of a sequence classifier on a task's labelled texts, to serve as a reward.

Texts are cut to random prefixes while it trains: a reward reads completions that stop anywhere.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase
from rlhf_exp.machine.precision import Dtype, autocast
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.models.classifiers import build_classifier, class_logits, head_modules
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.model_checks import must_be_plain
from rlhf_exp.models.scratch import ScratchClassifier
from rlhf_exp.rl.setup import fingerprints
from rlhf_exp.runs.context import Context
from rlhf_exp.settings import Artifact, Count, Fraction, Upstream, settings
from rlhf_exp.stages.check_saved import check_saved_classifier
from rlhf_exp.stages.protocol import Stage, StageResult
from rlhf_exp.tasks.batches import BatchStream, bucket_by_length
from rlhf_exp.tasks.protocol import LabelledTask, LabelledText
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import Schedule
from rlhf_exp.training.seeding import make_generator, stream_seed
from rlhf_exp.training.supervised import Supervised, SupervisedState

log = logging.getLogger(__name__)

NEEDS = "stage=classifier needs labelled texts: task=reviews or task=labelled_text"


@dataclass(frozen=True, kw_only=True)
class ClassifierParts:
    """The parts for training a classifier."""

    task: LabelledTask = field(metadata={"needs": NEEDS})
    model: ScratchClassifier | Pretrained
    optimizer: AdamWSettings
    schedule: Schedule


@settings
class TrainClassifier(Supervised, Stage[ClassifierParts]):
    """Cross-entropy on labels. `crop_fraction` of the texts are cut to a random prefix of at least
    `crop_min_tokens`; `token_noise` of the tokens are replaced by random ones."""

    Parts = ClassifierParts

    epochs: Count = 3
    """Passes over the texts."""
    log_every: Count = 20
    """Updates between log lines."""
    crop_fraction: Fraction = 0.5
    """Fraction of the texts that are cut to a random prefix, 0-1."""
    crop_min_tokens: Count = 10
    """Tokens of the shortest prefix."""
    token_noise: Fraction = 0.0
    """Fraction of the tokens that are replaced by random ones, 0-0.2."""
    dtype: Dtype = "fp32"
    """Dtype of forward passes: fp32, bf16; auto: bf16 if the device has instructions for it,
    which pays if d_model >= 256."""

    def check(self, parts: ClassifierParts) -> list[str]:
        model = parts.model
        if not isinstance(model, Pretrained):
            return []
        model.locate()
        return must_be_plain(model, stage="classifier")

    def check_texts(self, parts: ClassifierParts) -> list[str]:
        return self.check_updates(parts.schedule, len(parts.task.labelled_split().train))

    def artifact(self, parts: ClassifierParts, upstream: Upstream, *, path: str) -> Artifact:
        """A classifier with the labels of the texts."""
        return Artifact(labels=labels_of(parts.task.labelled_split().train))

    def metric_names(self, parts: ClassifierParts) -> tuple[str, ...]:
        return ("heldout/accuracy", "heldout/loss")

    def run(self, context: Context, parts: ClassifierParts) -> StageResult:
        """Trains, measures held-out accuracy, saves model and tokenizer; returns the result.

        The held-out texts choose nothing. Raises TrainingError naming the update if the loss
        is not finite.
        """
        clock, task, model = Stopwatch(), parts.task, parts.model
        with clock("load"), self.explaining("loading"):
            split = task.labelled_split()
            labels = labels_of(split.train)
            seed = stream_seed(context.seed, "model")
            built = build_classifier(model, task.build_tokenizer, labels, seed=seed)
            network, tokenizer = built.network.to(context.device), built.tokenizer
            train, held_out = (
                encode_labelled(tokenizer, texts, labels, limit=built.max_tokens) for texts in split
            )
        context.folder.start()
        log.info(
            "training %.2f M parameters on %d texts labelled %s; %d texts held out",
            network.num_parameters() / 1e6, len(train.rows), "/".join(labels), len(held_out.rows),
        )  # fmt: skip
        with clock("train"):
            num_updates = self.num_updates(len(train.rows))
            adamw = parts.optimizer.build(network.base_model, head_modules(network))
            network.train()
            generator = make_generator(context.seed, "minibatches")
            lengths = [*map(len, train.rows)]
            batches = BatchStream(bucket_by_length, lengths, self.batch_size, generator)
            state = SupervisedState(
                network=network,
                optimizer=adamw,
                scheduler=parts.schedule.build(adamw, total_steps=num_updates),
                batches=batches,
                inputs=fingerprints(network, task=task, model=model),
            )
            losses = self._losses(network, train, batches)
            self.fit(context, state, losses, num_updates=num_updates)
        with clock("evaluate"), self.explaining("evaluating"):
            metrics = held_out_metrics(network, held_out, batch_size=self.batch_size)
        context.folder.log(num_updates, metrics)
        log.info("held-out accuracy %.3f, loss %.3f", *metrics.values())
        with clock("save"):
            network.save_pretrained(context.folder.model)
            tokenizer.save_pretrained(context.folder.model)
            check_saved_classifier(network, context.folder.model)
        return StageResult(after=metrics, seconds=clock.seconds)

    def _losses(
        self, network: PreTrainedModel, data: "EncodedTexts", batches: BatchStream
    ) -> Iterator[torch.Tensor]:
        for index in batches:
            rows = [self._disturb(data.rows[i], network, batches.generator) for i in index]
            targets = torch.tensor([data.targets[i] for i in index], device=network.device)
            with autocast(self.dtype, network.device):
                logits = class_logits(network, rows)
            yield F.cross_entropy(logits.float(), targets)

    def _disturb(
        self, row: list[int], network: PreTrainedModel, generator: torch.Generator
    ) -> list[int]:
        crop, where = torch.rand(2, generator=generator).tolist()
        shortest = min(len(row), self.crop_min_tokens)
        if crop < self.crop_fraction:
            row = row[: shortest + int(where * (len(row) - shortest + 1))]
        if self.token_noise:
            ids = torch.tensor(row)
            noise = torch.rand(len(row), generator=generator) < self.token_noise
            random = torch.randint(network.config.vocab_size, ids.shape, generator=generator)
            row = torch.where(noise, random, ids).tolist()
        return row


class EncodedTexts(NamedTuple):
    """Token ids of each text, BOS first, and the index of its label."""

    rows: list[list[int]]
    targets: list[int]


def labels_of(texts: Sequence[LabelledText]) -> tuple[str, ...]:
    """The labels of the texts, sorted."""
    return tuple(sorted({text.label for text in texts}))


def encode_labelled(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[LabelledText],
    labels: tuple[str, ...],
    *,
    limit: int | None,
) -> EncodedTexts:
    """The texts cut to `limit` tokens, as the classifier's tokenizer encodes them when it is a
    reward."""
    cut = {"truncation": limit is not None, "max_length": limit}
    encoded = tokenizer([text.text for text in texts], **cut)
    return EncodedTexts(
        rows=encoded["input_ids"], targets=[labels.index(text.label) for text in texts]
    )


@torch.no_grad()
def held_out_metrics(
    network: PreTrainedModel, data: EncodedTexts, *, batch_size: int
) -> dict[str, float]:
    """Accuracy and mean cross-entropy in nats, dropout off."""
    network.eval()
    batches = [data.rows[i : i + batch_size] for i in range(0, len(data.rows), batch_size)]
    logits = torch.cat([class_logits(network, batch) for batch in batches]).cpu()
    targets = torch.tensor(data.targets)
    return {
        "heldout/accuracy": (logits.argmax(dim=-1) == targets).float().mean().item(),
        "heldout/loss": F.cross_entropy(logits, targets).item(),
    }

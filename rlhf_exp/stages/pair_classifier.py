"""A sequence classifier with one output, trained on preference pairs to serve as reward=pair_model.

Knows the classifier, its texts and its scores, not the losses.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.machine.precision import Dtype, autocast
from rlhf_exp.models.classifiers import new_head
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.rewards.protocol import RewardError
from rlhf_exp.rewards.sequence_classifier import SequenceClassifier
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.check_saved import check_saved_classifier
from rlhf_exp.stages.pair_data import PairData, Scores
from rlhf_exp.tasks.conversations import prompt_text
from rlhf_exp.tasks.pair_tokens import EncodedPair
from rlhf_exp.tasks.protocol import Pair

log = logging.getLogger(__name__)


def load_pair_classifier(
    model: Pretrained, *, batch_size: int, device: torch.device, seed: int
) -> SequenceClassifier:
    """The pretrained model with a new head of one output, drawn with the seed. It stays in
    evaluation mode: dropout would disturb the difference of two scores."""
    built = new_head(model, ("reward",), seed=seed)
    built.tokenizer.truncation_side = "left"  # the default of reward=pair_model
    return SequenceClassifier(
        name=model.base_model,
        field="model.base_model",
        model=built.network.to(device).eval(),
        tokenizer=built.tokenizer,
        max_tokens=built.max_tokens,
        batch_size=batch_size,
    )


def encode_texts(
    classifier: SequenceClassifier, pairs: Sequence[Pair], sources: Sequence[str]
) -> list[EncodedPair]:
    """The pairs as token ids of the texts that reward=pair_model reads: prompt, answer and EOS,
    whether the answer ended or not, or what the classifier's chat template makes of a conversation
    with its answer. Raises ConfigError naming the source of a text that the tokenizer cannot
    read."""
    encoded = []
    for pair, source in zip(pairs, sources, strict=True):
        row: dict[str, Any] = {"prompt": prompt_text(pair.prompt)}
        if not isinstance(pair.prompt, str):
            row["messages"] = pair.prompt
        try:
            chosen, rejected = (
                classifier.ids(row, answer, classifier.eos)
                for answer in (pair.chosen, pair.rejected)
            )
        except RewardError as error:
            raise ConfigError(f"task.path: {source}: {error}") from error
        encoded.append(EncodedPair(pair=pair, prompt=[], chosen=chosen, rejected=rejected))
    limit = classifier.max_tokens
    num_full = sum(limit in (len(p.chosen), len(p.rejected)) for p in encoded)
    if num_full:
        log.warning(
            "%d of %d pairs have a text that fills the model's %d tokens: a longer text loses its"
            " beginning, in training as under reward=pair_model", num_full, len(encoded), limit,
        )  # fmt: skip
    return encoded


class ClassifierPairs(PairData):
    """Pairs that a classifier scores by its only output."""

    def __init__(
        self, classifier: SequenceClassifier, pairs: Sequence[EncodedPair], *, dtype: Dtype
    ) -> None:
        super().__init__(pairs, classifier.model.device)
        self._classifier, self._dtype = classifier, dtype

    def multiplications(self, num_pairs: int) -> int:
        return 2 * num_pairs * self.longest() * self._classifier.model.num_parameters()

    def scores(self, index: Tensor) -> Scores:
        pairs = [self.pairs[i] for i in index.tolist()]
        rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        with autocast(self._dtype, self.device):
            logits = self._classifier.row_logits(rows)
        chosen, rejected = logits[:, 0].chunk(2)
        return chosen, rejected


def save_pair_classifier(classifier: SequenceClassifier, path: Path) -> None:
    """Writes model and tokenizer to the directory. Raises TrainingError unless the saved model
    gives the same logits."""
    classifier.model.save_pretrained(path)
    classifier.tokenizer.save_pretrained(path)
    check_saved_classifier(classifier.model, path)

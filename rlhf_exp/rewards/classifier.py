"""The probability that a sequence classifier gives a label.

It knows Hugging Face classifiers and texts: the classifier has its own tokenizer, and the policy's
tokens never reach it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import model_validator

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase
from rlhf_exp.models.loading import directory_hash, load_classifier, locate_model
from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.settings import ConfigError, Count, Text, settings
from rlhf_exp.types import Completions

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@settings
class Classifier:
    """P(label) of prompt and completion under any AutoModelForSequenceClassification.

    The label is given by `label`, or by `direction` for one whose name begins with pos or neg.
    dtype auto is fp16 on CUDA and fp32 elsewhere; scores are fp32 either way.
    """

    name: Text
    label: str | None = None
    direction: Literal["pos", "neg"] | None = None
    batch_size: Count = 64
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"

    @model_validator(mode="after")
    def _one_choice(self) -> "Classifier":
        if (self.label is None) == (self.direction is None):
            raise ValueError(
                f"label={self.label} and direction={self.direction}: set exactly one, the other"
                " null"
            )
        return self

    def fingerprint(self) -> str:
        """A hash of names, sizes and times of the directory's files, "" for a hub name and for what
        an earlier step will make."""
        return directory_hash(locate_model(self.name, field="reward.name"))

    def load(self, device: torch.device) -> RewardFunction:
        """The function, the classifier on the device. Raises ConfigError if the model cannot be
        loaded or has no such label."""
        auto = torch.float16 if device.type == "cuda" else torch.float32
        model, tokenizer = load_classifier(self.name, dtype=DTYPES.get(self.dtype, auto))
        _check_usable(self.name, model, tokenizer)
        labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
        label = self.find_label(labels)
        model.to(device)
        return lambda completions: torch.cat(
            [
                label_probability(model, tokenizer, batch, label)
                for batch in _batches(completions, self.batch_size)
            ]
        )

    def find_label(self, labels: Sequence[str]) -> int:
        """The index of the asked label among the classifier's. Raises ConfigError with all of them
        if it is not there."""
        for index, label in enumerate(labels):
            if label == self.label or (
                self.direction is not None and label.lower().startswith(self.direction)
            ):
                return index
        asked = f"label={self.label!r}" if self.label else f"direction={self.direction!r}"
        raise ConfigError(
            f"reward.{asked}: the classifier {self.name!r} has no such label;"
            f" set reward.label to one of {', '.join(labels)}"
            + (" and reward.direction=null" if self.direction else "")
        )


def _check_usable(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError for a model whose outputs are not probabilities of classes; gives one
    without padding token (GPT-2) its EOS for that."""
    if model.config.num_labels < 2 or model.config.problem_type == "multi_label_classification":
        raise ConfigError(
            f"reward.name={name!r}: it has {model.config.num_labels} output(s) and"
            f" problem_type={model.config.problem_type}; reward=classifier needs one of two or"
            " more exclusive labels"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"reward.name={name!r}: its tokenizer has no padding and no EOS token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def label_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], label: int
) -> torch.Tensor:
    """P(label) of each text, fp32 [texts], truncated to what the classifier can read."""
    positions = model.config.to_dict().get("max_position_embeddings")
    limit = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    encoded = tokenizer(
        texts, return_tensors="pt", padding=True, truncation=True, max_length=limit
    ).to(model.device)
    with torch.inference_mode():
        logits = model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
        ).logits
        probabilities = logits.float().softmax(dim=-1)[:, label]
    # Outside of inference mode, so that autograd may save what is computed from it.
    return probabilities.clone()


def _batches(completions: Completions, size: int) -> list[list[str]]:
    texts = list(completions.full_texts)
    return [texts[i : i + size] for i in range(0, len(texts), size)]

"""The logits of completions under a Hugging Face sequence classifier with its own tokenizer.

Knows texts, conversations, batches, truncation and devices, not what the outputs mean. It never
sees the policy's tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase
from rlhf_exp.models.classifiers import class_logits, load_classifier, readable_tokens
from rlhf_exp.models.hub import directory_hash, locate_model
from rlhf_exp.models.loading import DTYPES
from rlhf_exp.rewards.protocol import RewardError
from rlhf_exp.runs.context import pick_device
from rlhf_exp.settings import ConfigError, Count, Text, settings
from rlhf_exp.types import Completions

Side = Literal["right", "left"]


@dataclass(frozen=True, kw_only=True)
class SequenceClassifier:
    """A classifier on its device with its tokenizer; `field` is the key of its name. Texts are cut
    to `max_tokens`; None if neither the classifier nor its tokenizer has a limit."""

    name: str
    field: str = "reward.name"
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int | None
    batch_size: int

    @torch.no_grad()
    def logits(self, completions: Completions, *, suffix: str = "") -> Float[Tensor, "batch label"]:
        """The fp32 logits of each prompt with its completion, on the classifier's device.

        The classifier's chat template, if it has one, renders a conversation with its answer.
        Otherwise the text is the prompt, the completion and `suffix`, unless the completion ends
        with it.
        """
        pairs = zip(completions.prompts.rows, completions.texts, strict=True)
        return self.row_logits([self.ids(row, text, suffix) for row, text in pairs])

    @torch.no_grad()
    def text_logits(self, texts: Sequence[str]) -> Float[Tensor, "batch label"]:
        """The fp32 logits of texts, on the classifier's device."""
        return self.row_logits([self.ids({"prompt": ""}, text, "") for text in texts])

    @property
    def labels(self) -> list[str]:
        """The names of the outputs."""
        config = self.model.config
        return [str(config.id2label[i]) for i in range(config.num_labels)]

    @property
    def eos(self) -> str:
        """The text of EOS, "" if the tokenizer has none."""
        return self.tokenizer.eos_token or ""

    def row_logits(self, rows: Sequence[list[int]]) -> Float[Tensor, "batch label"]:
        """The fp32 logits of rows of token ids, on the classifier's device."""
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return torch.cat([class_logits(self.model, batch).float() for batch in batches])

    def ids(self, row: Mapping[str, Any], completion: str, suffix: str) -> list[int]:
        """The token ids of a prompt with its completion, as `logits` reads them. Raises RewardError
        if the tokenizer or its chat template cannot read them."""
        cut = {"truncation": self.max_tokens is not None, "max_length": self.max_tokens}
        try:
            if "messages" in row and self.tokenizer.chat_template:
                answer = {"role": "assistant", "content": completion}
                messages = [*(dict(message) for message in row["messages"]), answer]
                text = self.tokenizer.apply_chat_template(messages, tokenize=False)
                # The template contains BOS.
                return self.tokenizer(text, add_special_tokens=False, **cut)["input_ids"]
            text = row["prompt"] + completion
            return self.tokenizer(text if completion.endswith(suffix) else text + suffix, **cut)[
                "input_ids"
            ]
        except Exception as error:  # templates and tokenizers raise any kind, even a bare Exception
            raise RewardError(
                f"the tokenizer of {self.field}={self.name!r} cannot read the prompt"
                f" {row['prompt'][:60]!r} with the completion {completion[:60]!r}: {error}"
            ) from error


@settings
class SequenceClassifierSettings:
    """Settings of all rewards that read a sequence classifier: which one, and how it runs."""

    name: Text
    """Hub name, short name, directory, run folder or artifact:NAME."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; null: the newest."""
    batch_size: Count = 64
    """Texts a forward pass."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Dtype of the weights: fp32, fp16, bf16; auto: on CUDA fp16 (classifier) or bf16
    (pair_model), else fp32."""
    device: str | None = None
    """Cpu, cuda or cuda:N; null: where the policy is."""
    trust_remote_code: bool = False
    """True runs code that comes with the model."""

    def fingerprint(self) -> str:
        """A hash of the directory's files, "" for a hub name or an artifact of an earlier step."""
        return directory_hash(locate_model(self.name, field="reward.name"))

    def open_model(
        self, policy_device: torch.device, *, auto_on_cuda: torch.dtype, truncation_side: Side
    ) -> SequenceClassifier:
        """The classifier on `device`, by default the policy's. dtype auto is `auto_on_cuda` on CUDA
        and fp32 elsewhere. Raises ConfigError if the model cannot be loaded or the machine lacks
        the device."""
        device = reward_device(self.device, policy_device)
        auto = auto_on_cuda if device.type == "cuda" else torch.float32
        model, tokenizer = load_classifier(
            self.name,
            dtype=DTYPES.get(self.dtype, auto),
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        # Decoders would cache the keys and values of a whole batch for a next token.
        model.config.get_text_config().use_cache = False
        tokenizer.truncation_side = truncation_side
        return SequenceClassifier(
            name=self.name,
            model=model.to(device),
            tokenizer=tokenizer,
            max_tokens=readable_tokens(model, tokenizer),
            batch_size=self.batch_size,
        )


def reward_device(name: str | None, policy_device: torch.device) -> torch.device:
    """The device `name`, by default the policy's. Raises ConfigError if the machine lacks it."""
    if name is None:
        return policy_device
    try:
        device = pick_device(name)
    except ConfigError as error:
        raise ConfigError(f"reward.{error}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"reward.device={name}: this machine has {torch.cuda.device_count()} CUDA device(s),"
            " counted from cuda:0"
        )
    return device

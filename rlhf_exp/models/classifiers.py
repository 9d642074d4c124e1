"""Hugging Face sequence classifiers: saved ones, and ones to train on a pretrained model.

Knows labels, padding tokens and length limits, not what the outputs mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase
from rlhf_exp.models.hub import (
    GGUF,
    locate_revision,
    model_from_pretrained,
    tokenizer_from_pretrained,
    without_quantisation,
)
from rlhf_exp.models.loading import (
    LanguageModel,
    Pretrained,
    TokenizerFactory,
)
from rlhf_exp.models.scratch import ScratchClassifier
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.batches import pad_right

# transformers gives a tokenizer without a limit a number far above this.
NO_LIMIT = 10**9


@dataclass(frozen=True, kw_only=True)
class NewClassifier:
    """A classifier to train, with its tokenizer. Texts are cut to `max_tokens`."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int | None


def build_classifier(
    model: ScratchClassifier | Pretrained,
    make_tokenizer: TokenizerFactory,
    labels: Sequence[str],
    *,
    seed: int,
) -> NewClassifier:
    """A classifier with one output for each label. A pretrained model keeps its tokenizer; its head
    is drawn with the seed. Raises ConfigError for a pretrained model that has no classifier in
    transformers, or lacks other weights than the head's."""
    if isinstance(model, ScratchClassifier):
        tokenizer = with_leading_bos(make_tokenizer())
        network = model.classifier(tokenizer, tuple(labels), seed=seed)
        return NewClassifier(network=network, tokenizer=tokenizer, max_tokens=model.context_len)
    return new_head(model, labels, seed=seed)


def new_head(model: Pretrained, labels: Sequence[str], *, seed: int) -> NewClassifier:
    """The pretrained model with a new head for the labels."""
    from transformers import AutoModelForSequenceClassification

    field, name, source = "model.base_model", model.base_model, model.obtain()
    revision = None if source.endswith(GGUF) else model.revision
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": model.trust_remote_code}
    source = locate_revision(source, revision, field)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = model_from_pretrained(
            AutoModelForSequenceClassification, source, field, name,
            may_lack=is_head, ignore_mismatched_sizes=True, dtype=torch.float32,
            attn_implementation=model.attn_implementation,
            id2label=dict(enumerate(labels)), label2id={x: i for i, x in enumerate(labels)},
            **options,
        )  # fmt: skip
    if source.endswith(GGUF):
        network = without_quantisation(network)
    tokenizer = tokenizer_from_pretrained(source, field, name, padding_side="right", **options)
    set_padding(network, tokenizer, field=field, name=name)
    network.config.get_text_config().use_cache = False
    limit = readable_tokens(network, tokenizer)
    return NewClassifier(network=network, tokenizer=tokenizer, max_tokens=limit)


def is_head(network: PreTrainedModel, weight: str) -> bool:
    """Returns True for a weight of the classifier's head. BERT's pooler counts as one: models
    that predict masked words are saved without it."""
    return not weight.startswith(f"{network.base_model_prefix}.") or ".pooler." in weight


def head_modules(network: PreTrainedModel) -> nn.ModuleList:
    """The modules of a classifier that are not its base model."""
    return nn.ModuleList([m for m in network.children() if m is not network.base_model])


def class_logits(
    network: PreTrainedModel, rows: Sequence[list[int]]
) -> Float[Tensor, "batch label"]:
    """The classifier's logits for rows of token ids; an empty row is one padding token."""
    # Padded on the right with the id of the model's configuration, even if the tokenizer pads
    # otherwise: GPT-2 counts positions from the first column, and decoders read their logits at
    # the last token that differs from this id.
    fill = network.config.get_text_config().pad_token_id
    tokens = pad_right([row or [fill] for row in rows], fill=fill).to(network.device)
    mask = pad_right([[1] * max(1, len(row)) for row in rows], fill=0).to(network.device)
    return network(input_ids=tokens, attention_mask=mask).logits


def with_leading_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, changed to start each text with BOS, where the classifier reads its answer."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.padding_side = "right"
    return tokenizer


def load_classifier(
    name: str,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    field: str = "reward.name",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """A saved sequence classifier in evaluation mode and its tokenizer, with padding tokens as
    `set_padding` does. Raises ConfigError as `load_language_model` does."""
    from transformers import AutoModelForSequenceClassification

    source = locate_revision(name, revision, field)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = model_from_pretrained(
        AutoModelForSequenceClassification, source, field, name, dtype=dtype, **options
    )
    tokenizer = tokenizer_from_pretrained(source, field, name, **options)
    set_padding(model, tokenizer, field=field, name=name)
    return model.eval(), tokenizer


def set_padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, field: str, name: str
) -> None:
    """Gives a tokenizer without a padding token EOS as one (GPT-2), and the model's configuration
    the tokenizer's if its own is none of the model's tokens; the first Llama's was -1. Raises
    ConfigError if there is none."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"{field}={name!r}: its tokenizer has no padding and no EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    config = model.config.get_text_config()  # a part of a multimodal model's configuration
    size = model.get_input_embeddings().num_embeddings
    if config.pad_token_id not in range(size):
        config.pad_token_id = tokenizer.pad_token_id
    if config.pad_token_id not in range(size):
        raise ConfigError(
            f"{field}={name!r}: its padding token is {config.pad_token_id}, but the model has"
            f" {size} tokens; resize its embeddings, or save it with another padding token"
        )


def readable_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The largest number of tokens that model and tokenizer both accept, None without a limit."""
    config = model.config.get_text_config()
    key = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    limits = [tokenizer.model_max_length, config.to_dict().get(key) or NO_LIMIT]
    # RoBERTa and its relatives count positions from after the padding's, so they accept fewer than
    # their configuration says.
    limits += [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(module, nn.Embedding)
        and module.padding_idx is not None
    ]
    return min(limits) if min(limits) < NO_LIMIT else None

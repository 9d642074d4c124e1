"""Small models with random weights, of the same Hugging Face classes as pretrained ones."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase
from rlhf_exp.kernels.attention import install_kernels
from rlhf_exp.models.engines import EngineName
from rlhf_exp.models.loading import LanguageModel, TokenizerFactory, ValueHeadInit
from rlhf_exp.settings import BelowOne, ConfigError, Count, settings

# Each architecture's settings of dropout.
DROPOUTS = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "llama": ("attention_dropout",),
    "qwen2": ("attention_dropout",),
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
}


def _check_heads(d_model: int, num_heads: int) -> None:
    if d_model % num_heads:
        raise ValueError(f"d_model={d_model} must be a multiple of num_heads={num_heads}")


@settings
class Scratch:
    """A causal language model of the given shape with random weights and the task's tokenizer."""

    architecture: Literal["gpt2", "llama", "qwen2", "gpt_neox"] = "gpt2"
    """Gpt2, llama, qwen2, gpt_neox."""
    num_layers: Count = 2
    """Blocks."""
    d_model: Count = 64
    """Width; a multiple of num_heads."""
    num_heads: Count = 4
    """Attention heads."""
    context_len: Count = 64
    """Tokens."""
    dropout: BelowOne = 0.0
    """Dropout in pretraining, 0-0.3; PPO uses none."""
    tie_embeddings: bool | None = None
    """Whether input and output embedding share a matrix; null: the architecture's default."""
    engine: EngineName = "fast"
    """fast: the Hugging Face module; hooked: TransformerBridge."""
    value_head_init: ValueHeadInit = "default"
    """default: as nn.Linear; zero: every value starts at 0."""

    @model_validator(mode="after")
    def _divides(self) -> "Scratch":
        _check_heads(self.d_model, self.num_heads)
        width = self.d_model // self.num_heads
        # Rotary embeddings rotate pairs; GPT-NeoX's rotate a quarter of a head, at least one entry.
        if self.architecture in ("llama", "qwen2") and width % 2:
            raise ValueError(f"d_model/num_heads={width} must be even for {self.architecture}")
        if self.architecture == "gpt_neox" and width < 4:
            raise ValueError(f"d_model/num_heads={width} must be at least 4 for gpt_neox")
        return self

    def language_model(
        self, make_tokenizer: TokenizerFactory | None, *, seed: int
    ) -> LanguageModel:
        """The model, drawn with the seed, and the task's tokenizer. Raises ConfigError if the task
        has no texts to build one from."""
        if make_tokenizer is None:
            raise ConfigError(
                "model: a model from scratch needs a task with texts (task=reviews or"
                " task=labelled_text); for this task name a trained model: model=local"
                " model.base_model=DIRECTORY"
            )
        tokenizer = make_tokenizer()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self._model(len(tokenizer), tokenizer)
        install_kernels(model)
        return model, tokenizer

    def skeleton(self) -> PreTrainedModel:
        """The model of this shape without weights, and with two tokens."""
        with torch.device("meta"):
            model = self._model(2).eval()
        model.set_attn_implementation("eager")  # others read masks, which have no values here
        return model

    def value_head_path(self) -> Path | None:
        return None

    def _model(
        self, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> PreTrainedModel:
        from transformers import AutoConfig, AutoModelForCausalLM

        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        common: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in names}
        common["vocab_size"] = vocab_size
        if self.tie_embeddings is not None:
            common["tie_word_embeddings"] = self.tie_embeddings
        if self.architecture != "gpt2":  # where it is 4 d_model by default
            common["intermediate_size"] = 4 * self.d_model
        if self.architecture == "qwen2":
            common["num_key_value_heads"] = self.num_heads
        config = AutoConfig.for_model(
            self.architecture,
            num_hidden_layers=self.num_layers,
            hidden_size=self.d_model,
            num_attention_heads=self.num_heads,
            max_position_embeddings=self.context_len,
            **dict.fromkeys(DROPOUTS[self.architecture], self.dropout),
            **common,
        )
        return AutoModelForCausalLM.from_config(config)


@settings
class ScratchClassifier:
    """A DistilBERT sequence classifier of the given shape with random weights."""

    num_layers: Count = 1
    """Blocks."""
    d_model: Count = 64
    """Width; a multiple of num_heads."""
    num_heads: Count = 2
    """Attention heads."""
    context_len: Count = 64
    """Tokens; longer texts are cut."""
    dropout: BelowOne = 0.1
    """Dropout in the encoder during training."""
    head_dropout: BelowOne = 0.2
    """Dropout before the last layer during training."""

    @model_validator(mode="after")
    def _divides(self) -> "ScratchClassifier":
        _check_heads(self.d_model, self.num_heads)
        return self

    def classifier(
        self, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], *, seed: int
    ) -> PreTrainedModel:
        """The model, drawn with the seed, with one output for each label."""
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        config = DistilBertConfig(
            vocab_size=len(tokenizer),
            n_layers=self.num_layers,
            dim=self.d_model,
            hidden_dim=4 * self.d_model,
            n_heads=self.num_heads,
            max_position_embeddings=self.context_len,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            seq_classif_dropout=self.head_dropout,
            pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return DistilBertForSequenceClassification(config)

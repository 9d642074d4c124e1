"""Policies and classifiers from a hub name, a local directory, a run's folder or a GGUF file.

Knows Hugging Face's formats and how loading fails: every failure is a ConfigError that names the
model and the fix.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from pydantic import model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase
from rlhf_exp.kernels.attention import install_kernels
from rlhf_exp.models.cache import config_context_len
from rlhf_exp.models.engines import EngineName
from rlhf_exp.models.fast_paths import check_hooked, with_fast_paths
from rlhf_exp.models.fetching import fetch_model
from rlhf_exp.models.hub import (
    GGUF,
    directory_hash,
    find_file,
    from_pretrained,
    is_local,
    locate_gguf,
    locate_model,
    locate_revision,
    model_from_pretrained,
    refuse_encoder,
    tokenizer_from_pretrained,
    without_quantisation,
)
from rlhf_exp.models.known import KNOWN, fetched_folder
from rlhf_exp.models.lora import has_adapter
from rlhf_exp.models.policy import TransformerWithValueHead, initialise_value_head
from rlhf_exp.settings import ConfigError, Text, settings

VALUE_HEAD_FILE = "value_head.safetensors"
ValueHeadInit = Literal["default", "zero"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
WeightsDtype = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TokenizerFactory = Callable[[], PreTrainedTokenizerBase]
LanguageModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@runtime_checkable
class ModelSettings(Protocol):
    """The settings of a model group: a language model, and how to build a policy from it."""

    @property
    def engine(self) -> EngineName:
        """The engine that runs the policy."""
        ...

    @property
    def value_head_init(self) -> ValueHeadInit:
        """How to draw a value head that was not saved."""
        ...

    def language_model(
        self, make_tokenizer: TokenizerFactory | None, *, seed: int
    ) -> LanguageModel:
        """The model on the CPU and its tokenizer. `make_tokenizer` builds the task's tokenizer, for
        a model from scratch; None if the task has no texts."""
        ...

    def skeleton(self) -> PreTrainedModel | None:
        """The model without weights, on the meta device; None if this machine lacks it."""
        ...

    def value_head_path(self) -> Path | None:
        """The file of the value head that was saved with the model, or None."""
        ...


@settings
class Pretrained:
    """A saved model, named by hub name, short name, local directory, run folder or GGUF file. The
    quantised weights of a GGUF file become plain weights of `dtype`, which can be trained and
    saved.

    `dtype` is that of the weights; trained weights must be fp32, since bf16 rounds small updates
    away. Code that comes with a model runs only with trust_remote_code.
    """

    base_model: Text
    """Hub name, short name, directory, run folder, GGUF file or artifact:NAME."""
    fetch: bool = False
    """true: downloads a model with a short name (smollm2) if it is not in outputs/models."""
    gguf_file: str | None = None
    """A GGUF file in the directory or in the hub's repository; null: none."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository; null: its main branch."""
    dtype: WeightsDtype = "fp32"
    """Dtype of the weights: fp32; bf16 or fp16 halve frozen weights, with finetune=lora."""
    attn_implementation: Attention | None = None
    """Eager, sdpa, flash_attention_2; null: transformers' choice."""
    trust_remote_code: bool = False
    """true: runs Python code that comes with the model."""
    engine: EngineName = "fast"
    """fast: the Hugging Face module; hooked: TransformerBridge."""
    value_head_init: ValueHeadInit = "default"
    """default: as nn.Linear; zero: every value starts at 0; unused if a head was saved."""

    @model_validator(mode="after")
    def _fetches_known(self) -> "Pretrained":
        if self.fetch and self.base_model not in KNOWN:
            raise ValueError(
                f"fetch=true is for the models {', '.join(KNOWN)}: set it false for"
                f" base_model={self.base_model}"
            )
        return self

    @model_validator(mode="after")
    def _one_gguf_file(self) -> "Pretrained":
        if self.gguf_file is not None and self.base_model.endswith(GGUF):
            raise ValueError(
                f"gguf_file={self.gguf_file}: base_model={self.base_model} names a file already;"
                " set gguf_file=null"
            )
        return self

    @model_validator(mode="after")
    def _one_attention(self) -> "Pretrained":
        if self.engine == "hooked" and self.attn_implementation not in (None, "eager"):
            raise ValueError(
                f"attn_implementation={self.attn_implementation}: TransformerLens computes"
                " attention itself; set it null, or engine=fast"
            )
        return self

    @property
    def source(self) -> str:
        """What is loaded: `base_model`, or the path of its `gguf_file`."""
        if self.gguf_file is None:
            return self.base_model
        return locate_gguf(
            self.base_model, self.gguf_file, revision=self.revision, field="model.base_model"
        )

    def locate(self) -> str | None:
        """The source that `locate_model` finds, without downloading it; None if it is still to be
        fetched."""
        if self.fetch and not fetched_folder(self.base_model).is_dir():
            return None
        return locate_model(self.source)

    def obtain(self) -> str:
        """The source that `locate_model` finds, fetched first if `fetch` is set."""
        if self.fetch:
            fetch_model(KNOWN[self.base_model])
        return locate_model(self.source)

    def language_model(
        self, make_tokenizer: TokenizerFactory | None, *, seed: int
    ) -> LanguageModel:
        """The model and the tokenizer of its directory; the task's is not used."""
        self.obtain()
        return load_language_model(
            self.source,
            revision=self.revision if self.gguf_file is None else None,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )

    def skeleton(self) -> PreTrainedModel | None:
        """The model of the directory or the GGUF file, without weights; None for a hub name and for
        a model that is still to be fetched."""
        from transformers import AutoConfig, AutoModelForCausalLM

        source = self.locate()
        if source is None or not is_local(source):  # a hub name, or artifact:NAME
            return None
        code = {"trust_remote_code": self.trust_remote_code}
        config = from_pretrained(
            AutoConfig, source, "model.base_model", self.base_model, **code
        ).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **code)
        return model.eval()

    def fingerprint(self) -> str:
        """A hash of the files, "" for a hub name."""
        return directory_hash(self.obtain())

    def value_head_path(self) -> Path | None:
        """`value_head.safetensors` in the model's directory or repository, if it exists."""
        return find_file(self.obtain(), VALUE_HEAD_FILE, revision=self.revision)


def build_policy(
    model: ModelSettings,
    make_tokenizer: TokenizerFactory | None,
    *,
    device: torch.device,
    seed: int,
    value_head: bool = True,
) -> TransformerWithValueHead:
    """The policy of the settings, on the device. Its value head is loaded if it was saved, else
    drawn with the seed; with value_head=False there is none."""
    language_model, tokenizer = model.language_model(make_tokenizer, seed=seed)
    policy = TransformerWithValueHead(
        language_model.to(device), tokenizer, engine=model.engine, value_head=value_head
    )
    with_fast_paths(policy)
    if not policy.engine.is_plain:
        check_hooked(policy)
    if policy.value_head is None:
        return policy
    saved = model.value_head_path()
    if saved is not None:
        _load_value_head(policy.value_head, saved)
    else:
        initialise_value_head(
            policy.value_head,
            generator=torch.Generator().manual_seed(seed),
            zero_last=model.value_head_init == "zero",
        )
    return policy


def load_policy(
    path_or_name: str | Path,
    *,
    engine: EngineName = "fast",
    revision: str | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> TransformerWithValueHead:
    """A policy from a hub name, a Hugging Face directory or a run's folder, with its value head if
    that was saved. Raises ConfigError if there is no such model."""
    model = Pretrained(base_model=str(path_or_name), engine=engine, revision=revision)
    return build_policy(model, None, device=torch.device(device), seed=seed)


def load_language_model(
    name: str,
    *,
    revision: str | None = None,
    field: str = "model.base_model",
    dtype: WeightsDtype = "fp32",
    attn_implementation: Attention | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """A causal language model and its tokenizer. Raises ConfigError if the name is neither a
    directory with a model nor on a hub within reach, for a revision of a directory, for an adapter,
    and for a model that comes with code without trust_remote_code."""
    from transformers import AutoModelForCausalLM

    source = locate_revision(name, revision, field)
    if not source.endswith(GGUF):
        refuse_encoder(source, field, name, trust_remote_code, revision=revision)
    model = model_from_pretrained(
        AutoModelForCausalLM,
        source,
        field,
        name,
        revision=revision,
        dtype=DTYPES[dtype],
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    # transformers loads these adapters into their base model and freezes it.
    if has_adapter(model):
        raise ConfigError(
            f"{field}={name!r} holds an adapter: merge it into its base model with PEFT's"
            " merge_and_unload, save that, and name its directory"
        )
    if source.endswith(GGUF):
        model = without_quantisation(model)
    model = _text_part(model, field, name)
    tokenizer = load_tokenizer(
        name, revision=revision, field=field, trust_remote_code=trust_remote_code
    )
    if attn_implementation is None:
        install_kernels(model)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"{field}={name!r}: its tokenizer has {len(tokenizer)} tokens but the model"
            f" only {model.config.vocab_size}; save the tokenizer that the model was trained with"
        )
    return model, tokenizer


def _text_part(model: PreTrainedModel, field: str, name: str) -> PreTrainedModel:
    """The text part of a multimodal model, as a causal language model that shares its modules; any
    other model unchanged."""
    from transformers import AutoModelForCausalLM

    config = model.config.get_text_config()
    if config is model.config:
        return model
    decoder = model.get_decoder()
    try:
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config)
    except ValueError:  # transformers has no class for it
        plain = None
    if plain is None or type(plain.base_model) is not type(decoder):
        raise ConfigError(
            f"{field}={name!r}: {type(model).__name__} reads more than text, and its text part"
            " cannot be separated; name a language model"
        )
    setattr(plain, plain.base_model_prefix, decoder)
    plain.set_output_embeddings(model.get_output_embeddings())
    plain.generation_config = model.generation_config
    plain.name_or_path = model.name_or_path
    return plain.eval()


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    field: str = "model.base_model",
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, padding on the left. Raises ConfigError as `load_language_model`
    does."""
    source = locate_model(name, field=field)
    tokenizer = tokenizer_from_pretrained(
        source,
        field,
        name,
        revision=revision,
        padding_side="left",
        trust_remote_code=trust_remote_code,
    )
    # For a directory without a tokenizer, transformers returns one with only special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"{field}={name!r} holds no tokenizer; save the tokenizer that the model was"
            " trained with beside it"
        )
    return tokenizer


def load_context_len(name: str, *, field: str = "model.base_model") -> int:
    """The context of a model in tokens, read from its configuration. Raises ConfigError as
    `load_language_model` does."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, locate_model(name, field=field), field, name)
    return config_context_len(config.get_text_config(), name)


def _load_value_head(value_head: nn.Module, path: Path) -> None:
    try:
        value_head.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{path} is not a value head of this model; delete it to draw a new one.\n  {error}"
        ) from error

"""Policies and classifiers from a hub name, a local directory or a run's folder.

It knows Hugging Face's formats and what goes wrong with them: every failure is a ConfigError that
names the model and the fix.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase
from rlhf_exp.kernels.attention import install_kernels
from rlhf_exp.models.cache import config_context_len
from rlhf_exp.models.engines import ENGINES, EngineName
from rlhf_exp.models.hub import (
    directory_hash,
    find_file,
    from_pretrained,
    locate_model,
    locate_revision,
    model_from_pretrained,
    tokenizer_from_pretrained,
)
from rlhf_exp.models.lora import has_adapter
from rlhf_exp.models.policy import TransformerWithValueHead, initialise_value_head
from rlhf_exp.models.probing import check_hooked, probed
from rlhf_exp.settings import ConfigError, Text, is_reference, settings

VALUE_HEAD_FILE = "value_head.safetensors"
ValueHeadInit = Literal["default", "zero"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
WeightsDtype = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TokenizerFactory = Callable[[], PreTrainedTokenizerBase]
LanguageModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@runtime_checkable
class ModelSettings(Protocol):
    """What a model group offers: a language model, and how a policy is made of it."""

    @property
    def engine(self) -> EngineName:
        """What runs the policy."""
        ...

    @property
    def value_head_init(self) -> ValueHeadInit:
        """How a value head that was not saved is drawn."""
        ...

    def language_model(
        self, make_tokenizer: TokenizerFactory | None, *, seed: int
    ) -> LanguageModel:
        """The model on the CPU and its tokenizer. `make_tokenizer` builds the task's, for
        models that are built from nothing; None if the task has no texts."""
        ...

    def skeleton(self) -> PreTrainedModel | None:
        """The model without weights, on the meta device; None if it is not on this machine."""
        ...

    def value_head_path(self) -> Path | None:
        """The file of a value head saved with the model, if there is one."""
        ...


@settings
class Pretrained:
    """A model that exists: by hub name, local directory or run folder.

    `dtype` is of the weights; those that are trained must be fp32, since bf16 rounds small updates
    away. Code that comes with a model runs only with trust_remote_code.
    """

    base_model: Text
    """Hub name, directory, run folder or artifact:NAME."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository; null: its main branch."""
    dtype: WeightsDtype = "fp32"
    """Dtype of the weights: fp32; bf16 or fp16 halve what is frozen, see finetune=lora."""
    attn_implementation: Attention | None = None
    """Eager, sdpa, flash_attention_2; null: transformers' choice."""
    trust_remote_code: bool = False
    """true: runs Python code that comes with the model."""
    engine: EngineName = "fast"
    """fast: the Hugging Face module; hooked: TransformerBridge."""
    value_head_init: ValueHeadInit = "default"
    """default: as nn.Linear; zero: every value starts at 0; unused if a head was saved."""

    @model_validator(mode="after")
    def _one_attention(self) -> "Pretrained":
        if self.engine == "hooked" and self.attn_implementation not in (None, "eager"):
            raise ValueError(
                f"attn_implementation={self.attn_implementation}: TransformerLens computes"
                " attention itself; set it null, or engine=fast"
            )
        return self

    def language_model(
        self, make_tokenizer: TokenizerFactory | None, *, seed: int
    ) -> LanguageModel:
        """The model and the tokenizer that its directory holds; the task's is not used."""
        return load_language_model(
            self.base_model,
            revision=self.revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )

    def skeleton(self) -> PreTrainedModel | None:
        """The model of the directory's config.json without weights; None for a hub name."""
        from transformers import AutoConfig, AutoModelForCausalLM

        directory = locate_model(self.base_model)
        if is_reference(self.base_model) or not Path(directory).is_dir():
            return None
        code = {"trust_remote_code": self.trust_remote_code}
        config = from_pretrained(
            AutoConfig, directory, "model.base_model", self.base_model, **code
        ).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **code)
        return model.eval()

    def fingerprint(self) -> str:
        """A hash of the directory's files, "" for a hub name."""
        return directory_hash(locate_model(self.base_model))

    def value_head_path(self) -> Path | None:
        """`value_head.safetensors` in the model's directory or repository, if it is there."""
        return find_file(locate_model(self.base_model), VALUE_HEAD_FILE, revision=self.revision)


def must_be_fp32(model: ModelSettings) -> list[str]:
    """What is wrong with settings of a model whose own weights are trained, in PPO or elsewhere."""
    if isinstance(model, Pretrained) and model.dtype != "fp32":
        return [
            f"model.dtype={model.dtype}: weights that are trained must be fp32, or small updates"
            " are rounded away; set it fp32 (in PPO bf16 goes with finetune=lora)"
        ]
    return []


def must_be_plain(model: ModelSettings, *, stage: str) -> list[str]:
    """What is wrong with settings of a model that a supervised stage of that name trains."""
    problems = must_be_fp32(model)
    if not ENGINES[model.engine].is_plain:
        problems.append(
            f"model.engine=hooked is for stage=ppo; stage={stage} trains with engine=fast"
        )
    return problems


def build_policy(
    model: ModelSettings,
    make_tokenizer: TokenizerFactory | None,
    *,
    device: torch.device,
    seed: int,
    value_head: bool = True,
) -> TransformerWithValueHead:
    """The policy that the settings describe, on the device. A saved value head is loaded; else it
    is drawn with the seed. With value_head=False there is none."""
    language_model, tokenizer = model.language_model(make_tokenizer, seed=seed)
    policy = TransformerWithValueHead(
        language_model.to(device), tokenizer, engine=model.engine, value_head=value_head
    )
    probed(policy)
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
    """A policy from a hub name, a Hugging Face directory or a run's folder, its value head with it
    if it was saved. Raises ConfigError if there is no such model."""
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
    directory with a model nor known to a hub within reach, for a revision of a directory, for an
    adapter, and for a model that brings its own code unless that is trusted."""
    from transformers import AutoModelForCausalLM

    source = locate_revision(name, revision, field)
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
    # transformers puts such adapters into their base model, which is frozen then.
    if has_adapter(model):
        raise ConfigError(
            f"{field}={name!r} holds an adapter: merge it into its base model with PEFT's"
            " merge_and_unload, and name what that saves"
        )
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
    """Of a model that reads images or sound too, what reads and writes text, as the causal language
    model that it is; any other model itself. It takes over the modules, so nothing is copied."""
    from transformers import AutoModelForCausalLM

    config = model.config.get_text_config()
    if config is model.config:
        return model
    decoder = model.get_decoder()
    try:
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config)
    except ValueError:  # there is no class for it
        plain = None
    if plain is None or type(plain.base_model) is not type(decoder):
        raise ConfigError(
            f"{field}={name!r}: {type(model).__name__} reads more than text, and its text part"
            " cannot be taken out; name a language model"
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
    # Of a directory without a tokenizer transformers makes one that knows special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"{field}={name!r} holds no tokenizer; save the tokenizer that the model was"
            " trained with beside it"
        )
    return tokenizer


def load_context_len(name: str, *, field: str = "model.base_model") -> int:
    """Tokens that a model can attend to, from its configuration alone. Raises ConfigError as
    `load_language_model` does."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, locate_model(name, field=field), field, name)
    return config_context_len(config.get_text_config(), name)


def load_classifier(
    name: str,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    field: str = "reward.name",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """A sequence classifier and its tokenizer, in evaluation mode; one without a padding token
    (GPT-2) gets its EOS for that. Raises ConfigError as `load_language_model` does."""
    from transformers import AutoModelForSequenceClassification

    source = locate_revision(name, revision, field)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = model_from_pretrained(
        AutoModelForSequenceClassification, source, field, name, dtype=dtype, **options
    )
    tokenizer = tokenizer_from_pretrained(source, field, name, **options)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"{field}={name!r}: its tokenizer has no padding and no EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    config = model.config.get_text_config()  # of models that read more than text, a part
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _load_value_head(value_head: nn.Module, path: Path) -> None:
    try:
        value_head.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{path} is not a value head of this model; delete it to have one drawn.\n  {error}"
        ) from error

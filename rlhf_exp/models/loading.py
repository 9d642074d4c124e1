"""Policies and classifiers from a hub name, a local directory or a run's folder.

It knows Hugging Face's formats and what goes wrong with them: every failure is a ConfigError that
names the model and the fix.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase
from rlhf_exp.models.policy import Engine, TransformerWithValueHead, initialise_value_head
from rlhf_exp.network import reachable
from rlhf_exp.settings import ConfigError, Text, settings

VALUE_HEAD_FILE = "value_head.safetensors"
ValueHeadInit = Literal["default", "zero"]
TokenizerFactory = Callable[[], PreTrainedTokenizerBase]
LanguageModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@runtime_checkable
class ModelSettings(Protocol):
    """What a model group offers: a language model, and how a policy is made of it."""

    @property
    def engine(self) -> Engine:
        """What runs the policy."""
        ...

    @property
    def value_head_init(self) -> ValueHeadInit:
        """How a value head that was not saved is drawn."""
        ...

    def language_model(
        self, make_tokenizer: TokenizerFactory | None, *, seed: int
    ) -> LanguageModel:
        """The model on the CPU in fp32 and its tokenizer. `make_tokenizer` builds the task's, for
        models that are built from nothing; None if the task has no texts."""
        ...

    def value_head_path(self) -> Path | None:
        """The file of a value head saved with the model, if there is one."""
        ...


@settings
class Pretrained:
    """A model that exists: by hub name, local directory or run folder."""

    base_model: Text
    revision: str | None = None
    engine: Engine = "fast"
    value_head_init: ValueHeadInit = "default"

    def language_model(
        self, make_tokenizer: TokenizerFactory | None, *, seed: int
    ) -> LanguageModel:
        """The model and the tokenizer that its directory holds; the task's is not used."""
        return load_language_model(self.base_model, revision=self.revision)

    def fingerprint(self) -> str:
        """A hash of names, sizes and times of the directory's files, "" for a hub name."""
        return directory_hash(locate_model(self.base_model))

    def value_head_path(self) -> Path | None:
        """`value_head.safetensors` in the model's directory, if it is there."""
        path = Path(locate_model(self.base_model)) / VALUE_HEAD_FILE
        return path if path.is_file() else None


def directory_hash(path: str) -> str:
    """A hash of names, sizes and times of the files below a directory, "" if it is none."""
    source = Path(path)
    if not source.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted(source.rglob("*")):
        stat = file.stat()
        digest.update(f"{file.relative_to(source)} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def build_policy(
    model: ModelSettings,
    make_tokenizer: TokenizerFactory | None,
    *,
    device: torch.device,
    seed: int,
) -> TransformerWithValueHead:
    """The policy that the settings describe, on the device. A saved value head is loaded; else it
    is drawn with the seed."""
    language_model, tokenizer = model.language_model(make_tokenizer, seed=seed)
    policy = TransformerWithValueHead(language_model.to(device), tokenizer, engine=model.engine)
    _check_taken_apart(policy)
    saved = model.value_head_path()
    if saved is not None:
        _load_value_head(policy, saved)
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
    engine: Engine = "fast",
    revision: str | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> TransformerWithValueHead:
    """A policy from a hub name, a Hugging Face directory or a run's folder, its value head with it
    if it was saved. Raises ConfigError if there is no such model."""
    model = Pretrained(base_model=str(path_or_name), engine=engine, revision=revision)
    return build_policy(model, None, device=torch.device(device), seed=seed)


def load_language_model(
    name: str, *, revision: str | None = None, field: str = "model.base_model"
) -> LanguageModel:
    """A causal language model in fp32 and its tokenizer. Raises ConfigError if the name is neither
    a directory with a model nor known to a hub within reach, and for a revision of a directory."""
    from transformers import AutoModelForCausalLM

    source = locate_model(name, field=field)
    if revision is not None and Path(source).is_dir():
        raise ConfigError(
            f"model.revision={revision} is for hub names; {name!r} is a directory: set it null"
        )
    model = _model_from_pretrained(
        AutoModelForCausalLM, source, field, name, revision=revision, dtype=torch.float32
    )
    tokenizer = load_tokenizer(name, revision=revision, field=field)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"{field}={name!r}: its tokenizer has {len(tokenizer)} tokens but the model"
            f" only {model.config.vocab_size}; save the tokenizer that the model was trained with"
        )
    return model, tokenizer


def load_tokenizer(
    name: str, *, revision: str | None = None, field: str = "model.base_model"
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, padding on the left. Raises ConfigError as `load_language_model`
    does."""
    from transformers import AutoTokenizer

    source = locate_model(name, field=field)
    tokenizer = _from_pretrained(
        AutoTokenizer, source, field, name, revision=revision, padding_side="left"
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

    config = _from_pretrained(AutoConfig, locate_model(name, field=field), field, name)
    return int(config.max_position_embeddings)


def load_classifier(name: str, *, dtype: torch.dtype) -> LanguageModel:
    """A sequence classifier and its tokenizer, in evaluation mode. Raises ConfigError as
    `load_language_model` does."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = locate_model(name, field="reward.name")
    model = _model_from_pretrained(
        AutoModelForSequenceClassification, source, "reward.name", name, dtype=dtype
    )
    return model.eval(), _from_pretrained(AutoTokenizer, source, "reward.name", name)


def locate_model(name: str, *, field: str = "model.base_model") -> str:
    """Where transformers shall load `name` from: the directory itself, the `model/` of a run's
    folder, or the name unchanged if it can only be a hub's. Raises ConfigError for a directory
    without a model and for a path that does not exist."""
    path = Path(name).expanduser()
    if path.is_dir():
        for candidate in (path, path / "model"):
            if (candidate / "config.json").is_file():
                return str(candidate)
        raise ConfigError(
            f"{field}={name!r} is a directory without a model: neither config.json nor"
            " model/config.json is in it. Name a save_pretrained directory or a finished run."
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{field}={name!r}: no such directory")
    return name


def _model_from_pretrained(
    loader: Any, source: str, field: str, name: str, **options: Any
) -> PreTrainedModel:
    model, info = _from_pretrained(loader, source, field, name, output_loading_info=True, **options)
    # transformers draws such weights at random and goes on.
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{field}={name!r} was not saved as {type(model).__name__}: it lacks the weights"
            f" {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    return model


def _from_pretrained(loader: Any, source: str, field: str, name: str, **options: Any) -> Any:
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    local = Path(source).is_dir() or not reachable(hub)
    try:
        return loader.from_pretrained(source, local_files_only=local, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        if Path(source).is_dir():
            fix = f"{loader.__name__} must be able to open it"
        elif local:
            fix = f"{hub} is out of reach and it is not in the local cache; name a local directory"
        else:
            fix = f"check the name on {hub}, or name a local directory"
        raise ConfigError(f"{field}={name!r} cannot be loaded: {fix}.\n  {reason}") from error


def _load_value_head(policy: TransformerWithValueHead, path: Path) -> None:
    try:
        policy.value_head.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{path} is not a value head of this model; delete it to have one drawn.\n  {error}"
        ) from error


def _check_taken_apart(policy: TransformerWithValueHead) -> None:
    """Raises ConfigError for an architecture whose logits are more than its output embedding on its
    final hidden states (soft-capped or scaled logits, the heads of encoders), which this package
    does not handle."""
    tokens = torch.arange(min(8, len(policy.tokenizer)), device=policy.device)[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    calls: list[tuple[Tensor, Tensor]] = []

    def watch(module: Any, args: tuple[Tensor], logits: Tensor) -> Tensor:
        # So large that a soft cap shows even where the weights were just drawn.
        calls.append((args[0], logits + 100))
        return calls[-1][1]

    hook = policy.language_model.get_output_embeddings().register_forward_hook(watch)
    try:
        with torch.no_grad():
            whole = policy.language_model(input_ids=tokens, attention_mask=mask.long()).logits
    finally:
        hook.remove()
    with torch.no_grad():
        hidden = policy.hidden_states(tokens, mask)
    (unembedded, logits) = calls[-1]
    if not (
        torch.allclose(unembedded, hidden, rtol=1e-3, atol=1e-3) and torch.allclose(whole, logits)
    ):
        raise ConfigError(
            f"model: {type(policy.language_model).__name__} does more than its output embedding"
            " between final hidden states and logits; this architecture is not supported"
        )

"""Checks that a saved model is the trained one: loads it and compares logits of a few tokens.

Needs CPU memory for a second copy of the weights.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_exp.functional.logprobs import logits_agree
from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.models.cache import context_len
from rlhf_exp.models.classifiers import load_classifier
from rlhf_exp.models.loading import (
    DTYPES,
    VALUE_HEAD_FILE,
    LanguageModel,
    WeightsDtype,
    load_language_model,
)
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reward_model import HEAD_FILE, RewardModel
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import ConfigError

ROWS, LENGTH = 4, 16  # shape of the test batch


def check_saved_policy(policy: TransformerWithValueHead, path: Path) -> None:
    """Raises TrainingError unless the saved policy gives the same logits and has the same value
    head."""
    if policy.value_head is not None and policy.value_trunk is None:
        _check_head(policy.value_head, path / VALUE_HEAD_FILE)
    check_saved_language_model(policy.language_model, path)


def check_saved_reward_model(model: RewardModel, path: Path) -> None:
    """Raises TrainingError unless the saved reward model gives the same logits and has the same
    head."""
    _check_head(model.head, path / HEAD_FILE)
    check_saved_language_model(model.backbone.language_model, path)


def check_saved_language_model(network: PreTrainedModel, path: Path) -> None:
    """Raises TrainingError unless the saved model gives the same logits."""
    is_eager = network.config._attn_implementation == "eager"
    load = partial(
        load_language_model,
        dtype=next(name for name in get_args(WeightsDtype) if DTYPES[name] == network.dtype),
        attn_implementation="eager" if is_eager else None,
        trust_remote_code=_has_own_code(network),
    )
    _check_logits(network, load, path)


def check_saved_classifier(network: PreTrainedModel, path: Path) -> None:
    """Raises TrainingError unless the saved classifier gives the same logits."""
    load = partial(load_classifier, dtype=network.dtype, trust_remote_code=_has_own_code(network))
    _check_logits(network, load, path)


def _has_own_code(network: PreTrainedModel) -> bool:
    """True for a model whose code came with it; that code ran already."""
    return type(network).__module__.startswith("transformers_modules")


def _check_head(head: nn.Module, file: Path) -> None:
    trained = head.state_dict()
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _failed(file.parent, f"{file.name} cannot be read again: {error}") from error
    if saved.keys() != trained.keys() or not all(
        torch.equal(saved[name], tensor.cpu()) for name, tensor in trained.items()
    ):
        raise _failed(file.parent, f"{file.name} holds other weights")


@torch.no_grad()
def _check_logits(
    network: PreTrainedModel, load: Callable[[str], LanguageModel], path: Path
) -> None:
    try:
        saved, _ = load(str(path))
    except ConfigError as error:
        raise _failed(path, f"it cannot be read again: {error}") from error
    expected, saved_logits = _logits(network), _logits(saved)
    wrong = sum(
        not logits_agree(one, other, dtype=network.dtype)
        for one, other in zip(saved_logits, expected, strict=True)
    )
    # Across devices or in 16 bits, rounding may route a token to another expert.
    exact = network.device == saved.device and network.dtype == torch.float32
    if wrong > (0 if exact else len(expected) // 2):
        raise _failed(path, f"its logits differ at {wrong} of {len(expected)} tokens")


def _logits(network: PreTrainedModel) -> Float[Tensor, "rows vocab"]:
    vocab, shape = network.config.vocab_size, (ROWS, min(LENGTH, context_len(network)))
    tokens = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens).to(network.device)
    logits = network.eval()(input_ids=tokens.to(network.device), attention_mask=mask).logits
    return logits.flatten(0, -2).cpu()


def _failed(path: Path, reason: str) -> TrainingError:
    return TrainingError(
        f"{path}: the saved model is not the trained one: {reason}\n"
        "Do not use it. The run's checkpoints stay: resume the run to save the model again. If that"
        " fails too, report it with the architecture's name"
    )

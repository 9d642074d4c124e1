"""The scale and the soft cap that a language model applies to its output embedding's logits.

Both are measured, not read: configurations have many names for them, and one name can mean opposite
things (`logits_scaling` divides in Granite and multiplies in HyperCLOVA X).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.settings import ConfigError

# Powers of two, which no precision rounds: the first two give scale and cap, the others check.
SMALL, LARGE = 2.0**-10, 2.0**24
LOGITS = (SMALL, LARGE, 0.0, -1.0, 8.0, -32.0, 64.0, -LARGE)


class Unembedding(NamedTuple):
    """logits = scale (embedding of the final hidden states), and with a soft cap
    cap tanh(logits / cap)."""

    scale: float
    cap: float | None


@torch.no_grad()
def measure_unembedding(language_model: PreTrainedModel) -> Unembedding:
    """The scale and the cap that the model applies, measured in one pass over one token in which
    chosen final hidden states and chosen logits replace the model's.

    Raises ConfigError for a model that does anything else between final hidden states and logits,
    and for one without a base model or an output embedding. If a model calls only a part of its
    base model (OPT), steps between that and the embedding are not detected.
    """
    name = type(language_model).__name__
    embedding = language_model.get_output_embeddings()
    if embedding is None or language_model.base_model is language_model:
        raise ConfigError(
            f"model: {name} has no base model or no output embedding of its own; this architecture"
            " is not supported"
        )
    device, (vocab, d_model) = language_model.device, embedding.weight.shape
    rows = torch.linspace(0.5, 1.0, d_model, device=device)
    hidden = torch.stack([rows, -4 * rows])[None]
    wide = torch.float32 if device.type == "mps" else torch.float64
    chosen = torch.tensor(LOGITS, dtype=wide, device=device)
    chosen = chosen.repeat(vocab)[: 2 * vocab].view(1, 2, vocab)
    states: list[Tensor] = []

    def replace_hidden(module: Any, args: Any, output: Any) -> None:
        output.last_hidden_state = hidden
        states.append(hidden)

    def record_input(module: Any, args: tuple[Tensor]) -> Tensor:
        states.append(args[0])
        return args[0].to(embedding.weight.dtype)

    hooks = (
        language_model.base_model.register_forward_hook(replace_hidden),
        embedding.register_forward_pre_hook(record_input),
        embedding.register_forward_hook(lambda module, args, output: chosen),
    )
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        logits = language_model(
            input_ids=token, attention_mask=torch.ones_like(token), use_cache=False
        ).logits
    finally:
        for hook in hooks:
            hook.remove()
    input_scale = _ratio(states[-1], states[0]) if states else None
    fitted = _fitted(chosen, logits) if logits.shape == chosen.shape else None
    if input_scale is None or fitted is None or (embedding.bias is not None and input_scale != 1):
        raise ConfigError(
            f"model: {name} does more than its output embedding, a scale and a soft cap between"
            " final hidden states and logits; this architecture is not supported"
        )
    return Unembedding(input_scale * fitted.scale, fitted.cap)


def _ratio(actual: Tensor, hidden: Tensor) -> float | None:
    """The positive factor with actual = factor hidden, None if there is none."""
    if actual.shape != hidden.shape:
        return None
    ratio = _near_one(float(actual[0, 0, -1] / hidden[0, 0, -1]))
    return ratio if ratio > 0 and _close(actual, ratio * hidden) else None


def _fitted(logits: Tensor, changed: Tensor) -> Unembedding | None:
    """The scale and soft cap that turn `logits` into `changed`, None if there are none."""
    pairs = torch.stack([logits.double(), changed.double()]).flatten(1).cpu()
    (small, large), (scaled_small, scaled_large) = pairs[:, :2].tolist()
    if not 0 < scaled_small < scaled_large:
        return None
    cap = None if scaled_large / large > 1e-3 * scaled_small / small else scaled_large
    if cap is not None:  # tanh is almost, not exactly, the identity near 0
        scaled_small = cap * math.atanh(scaled_small / cap)
    scale = _near_one(scaled_small / small)
    expected = scale * pairs[0]
    if cap is not None:
        expected = cap * torch.tanh(expected / cap)
    return Unembedding(scale, cap) if _close(pairs[1], expected) else None


def _near_one(scale: float) -> float:
    return 1.0 if abs(scale - 1) < 1e-6 else scale


def _close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual.double(), expected.double(), rtol=1e-5, atol=1e-9)

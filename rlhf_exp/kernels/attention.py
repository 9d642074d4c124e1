"""Faster activation and attention for a Hugging Face model in memory, with the same results.

Knows transformers' activation and attention interfaces, not architectures. Does not change weights
or the configuration, nor what is saved.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from rlhf_exp.hf import PreTrainedModel

ATTENTION = "matmul_if_short"

# With at most this many keys, matrix products are faster on a CPU than torch's flash kernel, whose
# backward pass takes up to ten times as long (at 28 to 45 keys), and the scores need little memory.
SHORT = 512

# Options of transformers' SDPA attention that this attention does not implement.
UNSUPPORTED = {"position_bias", "softcap", "s_aux"}


def install_kernels(model: PreTrainedModel) -> None:
    """Replaces GPT-2's GELU, which transformers computes in eight steps, by one kernel, and
    transformers' "sdpa" attention by `attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.activations import NewGELUActivation
    from transformers.masking_utils import sdpa_mask

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch head seq d_head"],
    key: Float[Tensor, "batch kv_head keys d_head"],
    value: Float[Tensor, "batch kv_head keys d_value"],
    attention_mask: Shaped[Tensor, "#batch #head seq keys"] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch seq head d_value"], None]:
    """transformers' SDPA attention, computed by matrix products for few keys on a CPU. The results
    differ only by rounding, and are finite even where a query attends to nothing."""
    short = query.device.type == "cpu" and key.shape[2] <= SHORT
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    boolean = attention_mask is None or attention_mask.dtype == torch.bool
    unsupported = any(options.get(name) is not None for name in UNSUPPORTED)
    if not short or dropout > 0 or not boolean or unsupported:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **options,
        )  # fmt: skip
    hidden = None if attention_mask is None else ~attention_mask
    if hidden is None and causal and query.shape[2] > 1:
        hidden = _after(query.shape[2], key.shape[2], query.device)
    return _by_products(query, key, value, hidden, scaling), None


@lru_cache(maxsize=64)
def _after(seq: int, keys: int, device: torch.device) -> Tensor:
    ones = torch.ones(seq, keys, dtype=torch.bool, device=device)
    return ~ones.tril(keys - seq)[None, None]


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scaling: float | None
) -> Tensor:
    batch, head, seq, d_head = query.shape
    kv_head, keys = key.shape[1:3]
    # Heads that share keys (grouped-query attention) become further queries of one head.
    grouped = query.reshape(batch, kv_head, -1, d_head)
    one = grouped.shape[2] == 1  # a single query: elementwise products are faster still
    scores = torch.linalg.vecdot(key, grouped) if one else grouped @ key.transpose(-1, -2)
    scores = scores.view(batch, kv_head, -1, seq, keys) * (scaling or d_head**-0.5)
    if hidden is not None:
        by_group = hidden.unflatten(1, (1, 1) if hidden.shape[1] == 1 else (kv_head, -1))
        scores = scores.masked_fill(by_group, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(value.dtype)
    if one:
        mixed = (weights.view(batch, kv_head, keys, 1) * value).sum(dim=2)
    else:
        mixed = weights.view(batch, kv_head, -1, keys) @ value
    return mixed.view(batch, head, seq, -1).transpose(1, 2)

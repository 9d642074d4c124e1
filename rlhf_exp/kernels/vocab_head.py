"""Log-probabilities, entropy and exact KL straight from final hidden states, without the logits.

This is the one place that turns final hidden states into logits. It knows unembedding matrices, not
models. Forward and backward pass go through the vocabulary tile by tile, so that a whole
[positions, vocab] tensor never exists (unless one tile holds the vocabulary). Tests compare it with
the textbook form in `logprobs`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Numbers in a tile of logits: few enough for a processor's cache, enough to keep a GPU busy.
CPU_TILE, GPU_TILE = 2**18, 2**27
NARROWEST_TILE = 1024
# On a CPU, log-probs of policy and reference of at most this many numbers together (256 MiB) are
# kept for the backward pass; larger ones are computed again.
KEPT = 2**26


class TokenStatistics(NamedTuple):
    """The token's log-prob, the entropy and the exact KL at each position, in nats."""

    logprobs: Float[Tensor, "*axes"]
    entropy: Float[Tensor, "*axes"]
    kl: Float[Tensor, "*axes"]


class RolloutStatistics(NamedTuple):
    """TokenStatistics and the token's log-prob under the reference, in nats."""

    logprobs: Float[Tensor, "*axes"]
    entropy: Float[Tensor, "*axes"]
    kl: Float[Tensor, "*axes"]
    ref_logprobs: Float[Tensor, "*axes"]


class Head(NamedTuple):
    """An unembedding: logits = scale (hidden @ weight.T + bias), and with a soft cap
    cap tanh(logits / cap). If `gradient` is set, the gradient of `weight` is added to it instead of
    being returned to autograd: with a large vocabulary, allocating a second matrix of that size
    takes longer than computing the gradient."""

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None = None
    gradient: Float[Tensor, "vocab d_model"] | None = None
    scale: float = 1.0
    cap: float | None = None

    def divisor(self, temperature: float) -> float:
        """The number that divides hidden states and bias before the product. With a soft cap it
        leaves out the temperature, which applies after the cap."""
        return (temperature if self.cap is None else 1.0) / self.scale

    def soft_cap(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """logits / temperature after the cap; `logits` come from hidden states / `divisor`."""
        if self.cap is None:
            return logits
        return torch.tanh(logits / self.cap) * (self.cap / temperature)

    def slope(self, logits: Tensor, temperature: float) -> Tensor:
        """The derivative of `soft_cap` at its output `logits`. Only for a head with a cap."""
        assert self.cap is not None
        return (1 - (logits * (temperature / self.cap)).square()) / temperature


def token_statistics(
    hidden: Float[Tensor, "*axes d_model"],
    head: Float[Tensor, "vocab d_model"] | Head,
    tokens: Int[Tensor, "*axes"],
    ref_hidden: Float[Tensor, "*axes d_model"],
    ref_head: Float[Tensor, "vocab d_model"] | Head,
    *,
    temperature: float,
) -> TokenStatistics:
    """Log-probs of the tokens, entropy and exact D(policy || reference), as `token_logprobs`,
    `entropy` and `kl_divergence` of logits / temperature; with gradients for hidden and head.

    Logits and everything after them are fp32 (float64 for float64 input). Under autocast the
    operands of the logits on a GPU, and of the gradients everywhere, are in autocast's dtype.
    Logits must be finite. Raises ValueError for temperature <= 0.
    """
    statistics = _statistics(hidden, head, tokens, ref_hidden, ref_head, temperature)
    return TokenStatistics(*statistics[:3])


@torch.no_grad()
def rollout_statistics(
    hidden: Float[Tensor, "*axes d_model"],
    head: Float[Tensor, "vocab d_model"] | Head,
    tokens: Int[Tensor, "*axes"],
    ref_hidden: Float[Tensor, "*axes d_model"],
    ref_head: Float[Tensor, "vocab d_model"] | Head,
    *,
    temperature: float,
) -> RolloutStatistics:
    """`token_statistics` without gradients, and the reference's log-probs."""
    statistics = _statistics(hidden, head, tokens, ref_hidden, ref_head, temperature)
    return RolloutStatistics(*statistics)


def head_logprobs(
    hidden: Float[Tensor, "*axes d_model"],
    head: Float[Tensor, "vocab d_model"] | Head,
    tokens: Int[Tensor, "*axes"],
) -> Float[Tensor, "*axes"]:
    """The log-probs that `token_statistics` computes, where there is no reference: the model itself
    takes its place, which costs a second product with the head."""
    statistics = token_statistics(hidden, head, tokens, hidden.detach(), head, temperature=1.0)
    return statistics.logprobs


def head_logits(
    hidden: Float[Tensor, "*axes d_model"], head: Float[Tensor, "vocab d_model"] | Head
) -> Float[Tensor, "*axes vocab"]:
    """The logits, computed as `token_statistics` computes them. No gradients."""
    head = _as_head(head)
    low_dtype = low_precision(hidden)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = _logits(_divide(rows, head, 1.0), head, slice(None), 1.0, low_dtype)
    return logits.view(*hidden.shape[:-1], -1)


def unembed(hidden: Float[Tensor, "*axes d_model"], head: Head) -> Float[Tensor, "*axes vocab"]:
    """All logits at once in fp32 (float64 for float64 input), even under autocast; with
    gradients."""
    wide = _wide(hidden)
    bias = None if head.bias is None else head.bias.to(wide)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(wide), head.weight.to(wide), bias)
    return head.soft_cap(logits if head.scale == 1 else logits * head.scale)


def low_precision(like: Tensor) -> torch.dtype | None:
    """Autocast's dtype on the device of `like`, None without autocast."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _statistics(
    hidden: Tensor, head: Tensor | Head, tokens: Tensor, ref_hidden: Tensor,
    ref_head: Tensor | Head, temperature: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    head = _as_head(head)
    if head.gradient is not None:
        head = head._replace(weight=head.weight.detach())
    low_dtype = low_precision(hidden)
    with torch.autocast(hidden.device.type, enabled=False):  # this module casts explicitly
        statistics = _TokenStatistics.apply(
            hidden.reshape(-1, hidden.shape[-1]),
            *head,
            tokens.reshape(-1),
            ref_hidden.reshape(-1, ref_hidden.shape[-1]),
            _as_head(ref_head),
            temperature,
            low_dtype,
        )
    return tuple(statistic.view(tokens.shape) for statistic in statistics)


def _as_head(head: Tensor | Head) -> Head:
    return head if isinstance(head, Head) else Head(head)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _divide(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    divisor = head.divisor(temperature)
    wide = hidden.to(_wide(hidden))
    return wide if divisor == 1 else wide / divisor


def _tiles(weight: Tensor, rows: int) -> Iterator[slice]:
    size = GPU_TILE if weight.is_cuda else CPU_TILE
    step = max(NARROWEST_TILE, size // max(1, rows))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _is_kept(weight: Tensor, rows: int) -> bool:
    return not weight.is_cuda and 2 * rows * weight.shape[0] <= KEPT


def _product(a: Tensor, b: Tensor, low_dtype: torch.dtype | None) -> Tensor:
    # In low precision a GPU accumulates and returns fp32; a CPU returns rounded numbers.
    if low_dtype is None:
        return a @ b
    if a.is_cuda:
        return torch.mm(a.to(low_dtype), b.to(low_dtype), out_dtype=torch.float32)
    return a.to(low_dtype) @ b.to(low_dtype)


def _logits(
    scaled: Tensor, head: Head, tile: slice, temperature: float, low_dtype: torch.dtype | None
) -> Tensor:
    """Logits / temperature of the tile's tokens, from hidden states / the head's divisor."""
    weight = head.weight[tile]
    if scaled.is_cuda and low_dtype is not None:
        logits = _product(scaled, weight.t(), low_dtype)
    else:  # GPT-2's logits are around -100, where rounding to bf16 is off by up to a quarter
        logits = scaled @ weight.to(scaled.dtype).t()
    if head.bias is not None:
        logits += head.bias[tile].to(logits.dtype) / head.divisor(temperature)
    return head.soft_cap(logits, temperature)


def _target_logits(
    scaled: Tensor, head: Head, tokens: Tensor, temperature: float, low_dtype: torch.dtype | None
) -> Tensor:
    weight = head.weight[tokens]
    if low_dtype is not None and scaled.is_cuda:
        scaled, weight = scaled.to(low_dtype), weight.to(low_dtype)
    wide = _wide(scaled)
    logits = torch.linalg.vecdot(scaled.to(wide), weight.to(wide))
    if head.bias is not None:
        logits = logits + head.bias[tokens] / head.divisor(temperature)
    return head.soft_cap(logits, temperature)


class _LogSumExp:
    """The log-sum-exp of logits added tile by tile, and expectations under their softmax."""

    def __init__(self, like: Tensor) -> None:
        self.maximum = like.new_full((like.shape[0],), -torch.inf)
        self.total = like.new_zeros(like.shape[0])
        self.sums = (torch.zeros_like(self.total), torch.zeros_like(self.total))

    def add(self, logits: Tensor, difference: Tensor | None = None) -> None:
        """Adds a tile and overwrites it; with `difference` also updates `expectations`."""
        maximum = torch.maximum(self.maximum, logits.amax(dim=-1))
        fade = (self.maximum - maximum).exp()
        centred = logits.sub_(maximum[:, None])
        weights = centred.exp()
        if difference is not None:
            sum_logit, sum_diff = self.sums
            drop = torch.where(self.total > 0, self.maximum - maximum, 0.0)
            sum_logit = fade * (sum_logit + self.total * drop)
            sum_logit = sum_logit + torch.linalg.vecdot(weights, centred)
            sum_diff = fade * sum_diff + torch.linalg.vecdot(weights, difference)
            self.sums = (sum_logit, sum_diff)
        self.total = fade * self.total + weights.sum(dim=-1)
        self.maximum = maximum

    def value(self) -> Tensor:
        return self.maximum + self.log_total()

    def log_total(self) -> Tensor:
        return self.total.log()

    def expectations(self) -> tuple[Tensor, Tensor]:
        """The means of logits - maximum and of the difference."""
        sum_logit, sum_diff = self.sums
        return sum_logit / self.total, sum_diff / self.total


class _TokenStatistics(torch.autograd.Function):
    """With p, q the softmaxes of policy and reference, per position and token v:
    d logp(y) / dz_v = [v = y] - p_v
    d H       / dz_v = -p_v (log p_v + H)
    d KL      / dz_v = p_v (log p_v - log q_v - KL)
    so the gradient of z is p (A + B log p + C log q) plus the term of [v = y]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, sink: Tensor | None,
        scale: float, cap: float | None, tokens: Tensor, ref_hidden: Tensor, ref_head: Head,
        temperature: float, low_dtype: torch.dtype | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head = Head(weight, bias, None, scale, cap)
        scaled = _divide(hidden, head, temperature)
        ref_scaled = _divide(ref_hidden.to(scaled.dtype), ref_head, temperature)
        pol, ref = _LogSumExp(scaled), _LogSumExp(ref_scaled)
        is_kept = any(ctx.needs_input_grad) and _is_kept(weight, len(hidden))
        kept: list[Tensor] = []
        for tile in _tiles(weight, len(hidden)):
            logits = _logits(scaled, head, tile, temperature, low_dtype)
            ref_logits = _logits(ref_scaled, ref_head, tile, temperature, low_dtype)
            difference = logits - ref_logits
            if is_kept:
                kept += [logits, ref_logits]
                logits, ref_logits = logits.clone(), ref_logits.clone()
            pol.add(logits, difference)
            ref.add(ref_logits)
        for sums, tiles in ((pol, kept[::2]), (ref, kept[1::2])):
            for tile_logits in tiles:  # now log-probs; less rounded than logits - lse
                tile_logits.sub_(sums.maximum[:, None]).sub_(sums.log_total()[:, None])
        mean_logit, mean_diff = pol.expectations()
        entropy = pol.log_total() - mean_logit
        # Not pol.value() - ref.value(): the difference of two large numbers would be rounded.
        kl = mean_diff - (pol.maximum - ref.maximum) - (pol.log_total() - ref.log_total())
        lse, ref_lse = pol.value(), ref.value()
        logprobs = _target_logits(scaled, head, tokens, temperature, low_dtype) - lse
        ref_logprobs = (
            _target_logits(ref_scaled, ref_head, tokens, temperature, low_dtype) - ref_lse
        )
        ctx.mark_non_differentiable(ref_logprobs)
        ctx.save_for_backward(
            hidden, weight, bias, tokens, ref_hidden, ref_head.weight, ref_head.bias,
            lse, ref_lse, entropy, kl, *kept,
        )  # fmt: skip
        ctx.temperature, ctx.low_dtype, ctx.sink = temperature, low_dtype, sink
        ctx.shapes = (scale, cap), (ref_head.scale, ref_head.cap)
        return logprobs, entropy, kl, ref_logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, weight, bias, tokens, ref_hidden, ref_weight, ref_bias,
         lse, ref_lse, entropy, kl, *kept) = ctx.saved_tensors  # fmt: skip
        temperature, low_dtype = ctx.temperature, ctx.low_dtype
        by_logprob, by_entropy, by_kl = (g[:, None] for g in gradients[:3])
        factor = by_kl - by_entropy
        offset = -by_logprob - by_entropy * entropy[:, None] - by_kl * kl[:, None]
        shape, ref_shape = ctx.shapes
        head = Head(weight, bias, None, *shape)
        ref_head = Head(ref_weight, ref_bias, None, *ref_shape)
        divisor = head.divisor(temperature)
        scaled = _divide(hidden, head, temperature)
        ref_scaled = _divide(ref_hidden.to(scaled.dtype), ref_head, temperature)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        for_hidden = torch.zeros_like(scaled) if wants_hidden else None
        for_weight = ctx.sink
        if wants_weight and for_weight is None:
            for_weight = torch.zeros_like(weight)
        for_bias = torch.empty_like(bias) if wants_bias else None
        for i, tile in enumerate(_tiles(weight, len(hidden))):
            if kept:
                logprobs, ref_logprobs = kept[2 * i : 2 * i + 2]
            else:
                logprobs = _logits(scaled, head, tile, temperature, low_dtype).sub_(lse[:, None])
                ref_logprobs = _logits(ref_scaled, ref_head, tile, temperature, low_dtype)
                ref_logprobs.sub_(ref_lse[:, None])
            probs = logprobs.exp()
            step = ref_logprobs * -by_kl
            step.addcmul_(logprobs, factor).add_(offset).mul_(probs)
            if head.cap is not None:
                step *= head.slope(logprobs + lse[:, None], temperature)
            if for_hidden is not None:
                for_hidden += _product(step, weight[tile].to(step.dtype), low_dtype)
            if for_weight is not None:
                for_weight[tile] += _product(step.t(), scaled, low_dtype)
            if for_bias is not None:
                for_bias[tile] = step.sum(dim=0) / divisor
        if head.cap is not None:
            target_logits = _target_logits(scaled, head, tokens, temperature, low_dtype)
            by_logprob = by_logprob * head.slope(target_logits, temperature)[:, None]
        if for_hidden is not None:
            for_hidden += by_logprob * weight[tokens].to(for_hidden.dtype)
            for_hidden = (for_hidden / divisor).to(hidden.dtype)
        if for_weight is not None:
            for_weight.index_add_(0, tokens, (by_logprob * scaled).to(for_weight.dtype))
        if for_bias is not None:
            for_bias.index_add_(0, tokens, by_logprob[:, 0].to(for_bias.dtype) / divisor)
        if ctx.sink is not None:
            for_weight = None
        return for_hidden, for_weight, for_bias, *([None] * 8)

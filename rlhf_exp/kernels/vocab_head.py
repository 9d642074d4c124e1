"""Log-probabilities, entropy and exact KL straight from final hidden states, without the logits.

This is the one place that turns final hidden states into logits. It knows unembedding matrices, not
models. The vocabulary is walked tile by tile in the forward pass and again in the backward pass, so
that no [positions, vocab] tensor is ever whole (but of a vocabulary of one tile); the textbook form
in `logprobs` is what it is held against.
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


class TokenStatistics(NamedTuple):
    """What a policy's distribution at each position says of the token there, in nats."""

    logprobs: Float[Tensor, "*axes"]
    entropy: Float[Tensor, "*axes"]
    kl: Float[Tensor, "*axes"]


class RolloutStatistics(NamedTuple):
    """TokenStatistics and what the reference's distribution says of the token."""

    logprobs: Float[Tensor, "*axes"]
    entropy: Float[Tensor, "*axes"]
    kl: Float[Tensor, "*axes"]
    ref_logprobs: Float[Tensor, "*axes"]


class Head(NamedTuple):
    """An unembedding: logits = scale (hidden @ weight.T + bias), and with a soft cap
    cap tanh(logits / cap). The gradient of `weight` is added to `gradient` if that is given, in
    place of being returned to autograd: at large vocabularies a second matrix of that size costs
    more than computing it."""

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None = None
    gradient: Float[Tensor, "vocab d_model"] | None = None
    scale: float = 1.0
    cap: float | None = None

    def divisor(self, temperature: float) -> float:
        """What hidden states and bias are divided by before they are multiplied and added. A
        temperature divides capped logits only after the cap."""
        return (temperature if self.cap is None else 1.0) / self.scale

    def soft_cap(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Final logits / temperature, from hidden states divided by `divisor` and unembedded."""
        if self.cap is None:
            return logits
        return torch.tanh(logits / self.cap) * (self.cap / temperature)

    def slope(self, logits: Tensor, temperature: float) -> Tensor:
        """The derivative of `soft_cap` where it returns `logits`. Only for a head with a cap."""
        assert self.cap is not None
        return (1 - (logits * (temperature / self.cap)).square()) / temperature


def token_statistics(
    hidden: Float[Tensor, "*axes d_model"],
    unembed: Float[Tensor, "vocab d_model"] | Head,
    tokens: Int[Tensor, "*axes"],
    ref_hidden: Float[Tensor, "*axes d_model"],
    ref_unembed: Float[Tensor, "vocab d_model"] | Head,
    *,
    temperature: float,
) -> TokenStatistics:
    """Log-probs of the tokens, entropy and exact D(policy || reference), as `token_logprobs`,
    `entropy` and `kl_divergence` of logits / temperature; with gradients for hidden and unembed.

    Logits and everything after them are fp32 (float64 for float64 input). Under autocast a GPU
    forms them from operands in the low precision, and the gradients' products are in it everywhere.
    Logits must be finite. Raises ValueError for temperature <= 0.
    """
    columns = _columns(hidden, unembed, tokens, ref_hidden, ref_unembed, temperature)
    return TokenStatistics(*columns[:3])


@torch.no_grad()
def rollout_statistics(
    hidden: Float[Tensor, "*axes d_model"],
    unembed: Float[Tensor, "vocab d_model"] | Head,
    tokens: Int[Tensor, "*axes"],
    ref_hidden: Float[Tensor, "*axes d_model"],
    ref_unembed: Float[Tensor, "vocab d_model"] | Head,
    *,
    temperature: float,
) -> RolloutStatistics:
    """As `token_statistics`, without gradients and with the reference's log-probs."""
    columns = _columns(hidden, unembed, tokens, ref_hidden, ref_unembed, temperature)
    return RolloutStatistics(*columns)


def head_logits(
    hidden: Float[Tensor, "*axes d_model"], unembed: Float[Tensor, "vocab d_model"] | Head
) -> Float[Tensor, "*axes vocab"]:
    """The logits themselves, computed as everything here computes them. No gradients."""
    head = _head(unembed)
    low = low_precision(hidden)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = _logits(_divided(rows, head, 1.0), head, slice(None), 1.0, low)
    return logits.view(*hidden.shape[:-1], -1)


def unembed(hidden: Float[Tensor, "*axes d_model"], head: Head) -> Float[Tensor, "*axes vocab"]:
    """All logits at once, fp32 (float64 for float64 input) whatever autocast says; with
    gradients."""
    wide = _wide(hidden)
    bias = None if head.bias is None else head.bias.to(wide)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(wide), head.weight.to(wide), bias)
    return head.soft_cap(logits if head.scale == 1 else logits * head.scale)


def low_precision(like: Tensor) -> torch.dtype | None:
    """The dtype of autocast where `like` is, None outside of it."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _columns(
    hidden: Tensor, unembed: Tensor | Head, tokens: Tensor, ref_hidden: Tensor,
    ref_unembed: Tensor | Head, temperature: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    head = _head(unembed)
    if head.gradient is not None:
        head = head._replace(weight=head.weight.detach())
    low = low_precision(hidden)
    with torch.autocast(hidden.device.type, enabled=False):  # casts are made here, one by one
        columns = _TokenStatistics.apply(
            hidden.reshape(-1, hidden.shape[-1]),
            *head,
            tokens.reshape(-1),
            ref_hidden.reshape(-1, ref_hidden.shape[-1]),
            _head(ref_unembed),
            temperature,
            low,
        )
    return tuple(column.view(tokens.shape) for column in columns)


def _head(unembed: Tensor | Head) -> Head:
    return unembed if isinstance(unembed, Head) else Head(unembed)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _divided(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    divisor = head.divisor(temperature)
    wide = hidden.to(_wide(hidden))
    return wide if divisor == 1 else wide / divisor


def _tiles(weight: Tensor, rows: int) -> Iterator[slice]:
    size = GPU_TILE if weight.is_cuda else CPU_TILE
    step = max(NARROWEST_TILE, size // max(1, rows))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _product(a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor:
    # In low precision: a GPU adds up and returns fp32, a CPU returns what it rounded.
    if low is None:
        return a @ b
    if a.is_cuda:
        return torch.mm(a.to(low), b.to(low), out_dtype=torch.float32)
    return a.to(low) @ b.to(low)


def _logits(
    scaled: Tensor, head: Head, tile: slice, temperature: float, low: torch.dtype | None
) -> Tensor:
    """Logits / temperature of the tile's tokens, from hidden states divided by the head's
    divisor."""
    weight = head.weight[tile]
    if scaled.is_cuda and low is not None:
        logits = _product(scaled, weight.t(), low)
    else:  # a logit rounded to bf16 would be off by up to a quarter where GPT-2's are: around -100
        logits = scaled @ weight.to(scaled.dtype).t()
    if head.bias is not None:
        logits += head.bias[tile].to(logits.dtype) / head.divisor(temperature)
    return head.soft_cap(logits, temperature)


def _target_logits(
    scaled: Tensor, head: Head, tokens: Tensor, temperature: float, low: torch.dtype | None
) -> Tensor:
    weight = head.weight[tokens]
    if low is not None and scaled.is_cuda:
        scaled, weight = scaled.to(low), weight.to(low)
    wide = _wide(scaled)
    logits = torch.linalg.vecdot(scaled.to(wide), weight.to(wide))
    if head.bias is not None:
        logits = logits + head.bias[tokens] / head.divisor(temperature)
    return head.soft_cap(logits, temperature)


class _LogSumExp:
    """log sum exp of logits that come tile by tile, and expectations under their softmax."""

    def __init__(self, like: Tensor) -> None:
        self.maximum = like.new_full((like.shape[0],), -torch.inf)
        self.total = like.new_zeros(like.shape[0])
        self.means = (torch.zeros_like(self.total), torch.zeros_like(self.total))

    def add(self, logits: Tensor, difference: Tensor | None = None) -> None:
        """Takes a tile in, whose memory it uses; with `difference` it also adds up what
        `expectations` returns."""
        maximum = torch.maximum(self.maximum, logits.amax(dim=-1))
        fade = (self.maximum - maximum).exp()
        centred = logits.sub_(maximum[:, None])
        weights = centred.exp()
        if difference is not None:
            below, apart = self.means
            drop = torch.where(self.total > 0, self.maximum - maximum, 0.0)
            below = fade * (below + self.total * drop) + torch.linalg.vecdot(weights, centred)
            apart = fade * apart + torch.linalg.vecdot(weights, difference)
            self.means = (below, apart)
        self.total = fade * self.total + weights.sum(dim=-1)
        self.maximum = maximum

    def value(self) -> Tensor:
        return self.maximum + self.log_total()

    def log_total(self) -> Tensor:
        return self.total.log()

    def expectations(self) -> tuple[Tensor, Tensor]:
        """The means of logits - maximum and of the difference."""
        below, apart = self.means
        return below / self.total, apart / self.total


class _TokenStatistics(torch.autograd.Function):
    """With p, q the softmaxes of policy and reference, per position and token v:
    d logp(y) / dz_v = [v = y] - p_v
    d H       / dz_v = -p_v (log p_v + H)
    d KL      / dz_v = p_v (log p_v - log q_v - KL)
    so that the gradient of z is p (A + B log p + C log q) and the first term's [v = y]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, sink: Tensor | None,
        scale: float, cap: float | None, tokens: Tensor, ref_hidden: Tensor, ref_head: Head,
        temperature: float, low: torch.dtype | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head = Head(weight, bias, None, scale, cap)
        scaled = _divided(hidden, head, temperature)
        ref_scaled = _divided(ref_hidden.to(scaled.dtype), ref_head, temperature)
        own, ref = _LogSumExp(scaled), _LogSumExp(ref_scaled)
        for tile in _tiles(weight, len(hidden)):
            logits = _logits(scaled, head, tile, temperature, low)
            ref_logits = _logits(ref_scaled, ref_head, tile, temperature, low)
            own.add(logits, logits - ref_logits)
            ref.add(ref_logits)
        kept: tuple[Tensor, ...] = ()
        if (
            any(ctx.needs_input_grad) and weight.shape[0] <= NARROWEST_TILE
        ):  # one tile, which the two have centred in place
            kept = (
                logits.sub_(own.log_total()[:, None]),
                ref_logits.sub_(ref.log_total()[:, None]),
            )
        below, apart = own.expectations()
        entropy = own.log_total() - below
        # Not own.value() - ref.value(): of two large numbers the difference would be rounded.
        kl = apart - (own.maximum - ref.maximum) - (own.log_total() - ref.log_total())
        lse, ref_lse = own.value(), ref.value()
        logprobs = _target_logits(scaled, head, tokens, temperature, low) - lse
        ref_logprobs = _target_logits(ref_scaled, ref_head, tokens, temperature, low) - ref_lse
        ctx.mark_non_differentiable(ref_logprobs)
        ctx.save_for_backward(
            hidden, weight, bias, tokens, ref_hidden, ref_head.weight, ref_head.bias,
            lse, ref_lse, entropy, kl, *kept,
        )  # fmt: skip
        ctx.temperature, ctx.low, ctx.sink = temperature, low, sink
        ctx.shapes = (scale, cap), (ref_head.scale, ref_head.cap)
        return logprobs, entropy, kl, ref_logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, weight, bias, tokens, ref_hidden, ref_weight, ref_bias,
         lse, ref_lse, entropy, kl, *kept) = ctx.saved_tensors  # fmt: skip
        temperature, low = ctx.temperature, ctx.low
        by_logprob, by_entropy, by_kl = (g[:, None] for g in gradients[:3])
        factor = by_kl - by_entropy
        offset = -by_logprob - by_entropy * entropy[:, None] - by_kl * kl[:, None]
        own_shape, ref_shape = ctx.shapes
        head = Head(weight, bias, None, *own_shape)
        ref_head = Head(ref_weight, ref_bias, None, *ref_shape)
        divisor = head.divisor(temperature)
        scaled = _divided(hidden, head, temperature)
        ref_scaled = _divided(ref_hidden.to(scaled.dtype), ref_head, temperature)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        for_hidden = torch.zeros_like(scaled) if wants_hidden else None
        for_weight = ctx.sink
        if wants_weight and for_weight is None:
            for_weight = torch.zeros_like(weight)
        for_bias = torch.empty_like(bias) if wants_bias else None
        for tile in _tiles(weight, len(hidden)):
            if kept:
                logprobs, ref_logprobs = kept
            else:
                logprobs = _logits(scaled, head, tile, temperature, low).sub_(lse[:, None])
                ref_logprobs = _logits(ref_scaled, ref_head, tile, temperature, low)
                ref_logprobs.sub_(ref_lse[:, None])
            probs = logprobs.exp()
            step = ref_logprobs * -by_kl
            step.addcmul_(logprobs, factor).add_(offset).mul_(probs)
            if head.cap is not None:
                step *= head.slope(logprobs + lse[:, None], temperature)
            if for_hidden is not None:
                for_hidden += _product(step, weight[tile].to(step.dtype), low)
            if for_weight is not None:
                for_weight[tile] += _product(step.t(), scaled, low)
            if for_bias is not None:
                for_bias[tile] = step.sum(dim=0) / divisor
        if head.cap is not None:
            target_logits = _target_logits(scaled, head, tokens, temperature, low)
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

"""Log-probabilities, entropy and KL divergence from logits.

Knows vocabularies and tokens, not prompts: callers select the completion with `completion_part`,
the only place that shifts by one.
"""

import warnings
from typing import Literal

import torch
from eindex import eindex
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from rlhf_exp.functional.masking import masked_fill_zero

# eindex 0.1.2 indexes with a list instead of a tuple, and torch warns about that; a test compares
# the result with gather. Remove this once eindex uses a tuple.
warnings.filterwarnings("ignore", message="Using a non-tuple sequence", module="eindex")

KLEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS: tuple[KLEstimator, ...] = ("k1", "k2", "k3")


def completion_part(
    x: Shaped[Tensor, "batch seq *rest"], prompt_len: int
) -> Shaped[Tensor, "batch completion *rest"]:
    """The positions of `x` that predict the completion's tokens: x[:, prompt_len - 1 : -1], since
    position p - 1 predicts the token at position p.

    Raises ValueError if prompt_len is not in 1 .. seq.
    """
    if not 1 <= prompt_len <= x.shape[1]:
        raise ValueError(f"prompt_len={prompt_len} must be in 1 .. {x.shape[1]} (seq)")
    return x[:, prompt_len - 1 : -1]


def completion_logits(
    logits: Float[Tensor, "batch seq vocab"], prompt_len: int
) -> Float[Tensor, "batch completion vocab"]:
    """The logits from which each completion token was sampled; `completion_part` of logits."""
    return completion_part(logits, prompt_len)


def token_logprobs(
    logits: Float[Tensor, "batch completion vocab"], tokens: Int[Tensor, "batch completion"]
) -> Float[Tensor, "batch completion"]:
    """log softmax(logits) at each token: log p(y_t | x, y_<t)."""
    return eindex(logits.log_softmax(dim=-1), tokens, "batch completion [batch completion]")


def entropy(
    logits: Float[Tensor, "batch completion vocab"],
) -> Float[Tensor, "batch completion"]:
    """Entropy of softmax(logits) at each position, in nats. A token with logit -inf contributes
    0."""
    logprobs = logits.log_softmax(dim=-1)
    return -_expectation(logprobs, logprobs)


def kl_divergence(
    logits: Float[Tensor, "batch completion vocab"],
    ref_logits: Float[Tensor, "batch completion vocab"],
) -> Float[Tensor, "batch completion"]:
    """Exact D(policy || reference) = sum_v p(v) (log p(v) - log q(v)) at each position, in nats.

    Tokens of policy probability 0 contribute 0. It is infinite if the policy can emit a token that
    the reference cannot.
    """
    logprobs = logits.log_softmax(dim=-1)
    return _expectation(logprobs, logprobs - ref_logits.log_softmax(dim=-1))


def kl_estimate(
    logprobs: Float[Tensor, "batch completion"],
    ref_logprobs: Float[Tensor, "batch completion"],
    estimator: KLEstimator,
) -> Float[Tensor, "batch completion"]:
    """An estimate of D(policy || reference) from the sampled tokens only, in nats.

    With d = log p - log q: k1 = d, unbiased and of either sign; k2 = d^2 / 2, biased; k3 =
    exp(-d) - 1 + d, unbiased and never negative. Source: J. Schulman, "Approximating KL
    divergence". Raises ValueError for another name.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"estimator={estimator!r} must be one of k1, k2, k3")


def _expectation(
    logprobs: Float[Tensor, "batch completion vocab"], x: Float[Tensor, "batch completion vocab"]
) -> Float[Tensor, "batch completion"]:
    # A token of probability 0 gives 0 * inf; zeroing x there keeps value and gradient finite. The
    # test is on the probability, which underflows while its logarithm is still finite.
    probs = logprobs.exp()
    return (probs * masked_fill_zero(x, probs != 0)).sum(dim=-1)


# The largest relative difference of logits that rounding explains.
ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def logits_agree(
    logits: Float[Tensor, "*axes vocab"],
    expected: Float[Tensor, "*axes vocab"],
    *,
    dtype: torch.dtype,
) -> bool:
    """Returns True if logits equal the expected ones up to the rounding of a model in `dtype`:
    |logits - expected| <= tolerance |expected| at each position, both centred over the vocabulary,
    since a constant added to all logits changes no probability."""
    tolerance = ROUNDING[dtype]
    logits, expected = (x.float() - x.float().mean(-1, keepdim=True) for x in (logits, expected))
    error = (logits - expected).norm(dim=-1)
    return bool((error <= tolerance * expected.norm(dim=-1)).all())

"""Two models' next-token distributions compared: KL both ways, by token, entropy and surprise."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_exp.functional.masking import masked_fill_zero


class Comparison(NamedTuple):
    """At each position, in nats and 0 in the padding: KL of the policy to the base and back,
    entropies, and surprises (-log-probs of the token). For each token of the vocabulary, summed
    over a sample's positions: the rise of its probability; summed over all positions: its term of
    the KL, and its probabilities."""

    kl: Float[Tensor, "batch completion"]
    reverse_kl: Float[Tensor, "batch completion"]
    entropy: Float[Tensor, "batch completion"]
    base_entropy: Float[Tensor, "batch completion"]
    surprise: Float[Tensor, "batch completion"]
    base_surprise: Float[Tensor, "batch completion"]
    rise: Float[Tensor, "batch vocab"]
    kl_terms: Float[Tensor, " vocab"]
    probs: Float[Tensor, " vocab"]
    base_probs: Float[Tensor, " vocab"]


def compare(
    logits: Float[Tensor, "batch completion vocab"],
    base_logits: Float[Tensor, "batch completion vocab"],
    tokens: Int[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
) -> Comparison:
    """The policy p compared with the base q. KL is sum_v p(v) (log p(v) - log q(v)), whose terms by
    v are `kl_terms`; its reverse exchanges p and q. Tokens of probability 0 contribute 0."""
    logp, logq = logits.log_softmax(dim=-1), base_logits.log_softmax(dim=-1)
    p, q = logp.exp(), logq.exp()
    terms = p * masked_fill_zero(logp - logq, p != 0)
    reverse = q * masked_fill_zero(logq - logp, q != 0)
    real = mask[..., None]

    def at(values: Tensor) -> Tensor:
        return masked_fill_zero(values, mask)

    def over_positions(values: Tensor) -> Tensor:
        return masked_fill_zero(values, real.expand_as(values)).sum(dim=1)

    return Comparison(
        kl=at(terms.sum(dim=-1)),
        reverse_kl=at(reverse.sum(dim=-1)),
        entropy=at(-(p * masked_fill_zero(logp, p != 0)).sum(dim=-1)),
        base_entropy=at(-(q * masked_fill_zero(logq, q != 0)).sum(dim=-1)),
        surprise=at(-logp.gather(-1, tokens[..., None]).squeeze(-1)),
        base_surprise=at(-logq.gather(-1, tokens[..., None]).squeeze(-1)),
        rise=over_positions(p - q),
        kl_terms=over_positions(terms).sum(dim=0),
        probs=over_positions(p).sum(dim=0),
        base_probs=over_positions(q).sum(dim=0),
    )

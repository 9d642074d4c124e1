"""The settings of every sampler, and the steps from tokens to completions.

A sampler draws from the filtered distribution. Its log-probs are the policy's: of the
temperature-scaled distribution over the full vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_exp.functional.sampling import draw_tokens, filter_logits
from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.kernels.vocab_head import head_logits
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import ConfigError, Count, Temperature, TopP, settings
from rlhf_exp.types import Completions, Generation, PromptBatch


@settings
class Sampler(ABC):
    """Settings that all samplers share. `top_k=1` is greedy decoding."""

    gen_len: Count = 24
    """Most tokens of a completion."""
    temperature: Temperature = 1.0
    """Divides the logits for sampling, log-probs, KL and entropy; 0.5-1."""
    top_k: Count | None = None
    """Sample from this many tokens only; 1 is greedy; null: no limit."""
    top_p: TopP = 1.0
    """Sample from the most probable tokens of this mass only, 0-1."""
    stop_at_eos: bool = False
    """true: a completion ends at the first end-of-sequence token."""

    @abstractmethod
    def __call__(
        self, policy: TransformerWithValueHead, prompts: PromptBatch, generator: torch.Generator
    ) -> Generation:
        """Completions of the prompts with their log-probs, values and hidden states. No
        gradients."""

    @property
    def truncates(self) -> bool:
        """True if the filter excludes tokens that the policy could emit."""
        return self.top_k is not None or self.top_p < 1

    @cached_property
    def full_distribution(self) -> "Sampler":
        """This sampler at temperature 1 without filters, as evaluations use it."""
        return replace(self, temperature=1.0, top_k=None, top_p=1.0)  # type: ignore[type-var]

    @cached_property
    def greedy(self) -> "Sampler":
        """This sampler with top_k=1: it takes the most probable token."""
        return replace(self, top_k=1)  # type: ignore[type-var]

    def filter(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        """The logits that this sampler draws from."""
        return filter_logits(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )


class Drawn(NamedTuple):
    """A token a row, its log-prob, and the policy's probability of all tokens that the filter
    kept."""

    tokens: Int[Tensor, " batch"]
    logprobs: Float[Tensor, " batch"]
    kept_mass: Float[Tensor, " batch"]


def draw(
    sampler: Sampler,
    policy: CausalTransformer,
    hidden: Float[Tensor, "batch d_model"],
    uniforms: Float[Tensor, " batch"],
) -> Drawn:
    """The tokens that the sampler draws from final hidden states, one for each row; `uniforms` are
    random numbers in [0, 1)."""
    with policy.autocast():
        logits = head_logits(hidden, policy.head)
    logprobs = (logits / sampler.temperature).log_softmax(dim=-1)
    if sampler.truncates:
        filtered = sampler.filter(logits)
        tokens = draw_tokens(filtered.softmax(dim=-1), uniforms)
        mass = kept_mass(logprobs, filtered)
    else:
        tokens = draw_tokens(logprobs.exp(), uniforms)
        mass = torch.ones_like(uniforms)
    return Drawn(tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1), mass)


def kept_mass(
    logprobs: Float[Tensor, "batch vocab"], filtered: Float[Tensor, "batch vocab"]
) -> Float[Tensor, " batch"]:
    """The policy's total probability of the tokens that a filter kept."""
    return logprobs.exp().masked_fill(filtered == -torch.inf, 0).sum(dim=-1)


def through_first_eos(
    tokens: Int[Tensor, "batch completion"], eos: int | None
) -> Bool[Tensor, "batch completion"]:
    """True through each row's first EOS; everywhere in a row without EOS or if `eos` is None."""
    if eos is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    is_eos = tokens == eos
    return (is_eos.cumsum(dim=1) - is_eos.long()) == 0


def as_completions(
    policy: CausalTransformer,
    prompts: PromptBatch,
    tokens: Int[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
) -> Completions:
    """The completions. Each text is decoded together with its prompt, so that a leading space or a
    merged character is the same as in the whole text."""
    texts = []
    for before, prompt, start, row, length in zip(
        prompts.texts,
        prompts.tokens.tolist(),
        (~prompts.mask).sum(dim=1).tolist(),
        tokens.tolist(),
        mask.sum(dim=1).tolist(),
        strict=True,
    ):
        ids = row[:length]
        whole = policy.tokenizer.decode([*prompt[start:], *ids], skip_special_tokens=True)
        if whole.startswith(before):
            texts.append(whole[len(before) :])
        else:  # the prompt ends within a character
            texts.append(policy.tokenizer.decode(ids, skip_special_tokens=True))
    return Completions(prompts=prompts, tokens=tokens * mask, mask=mask, texts=tuple(texts))


def check_finite(x: Float[Tensor, "*axes"]) -> None:
    """Raises TrainingError if logits or log-probs are not finite: the weights have diverged."""
    if not x.isfinite().all():
        raise TrainingError(
            "the policy's logits are not finite: its weights have diverged; lower"
            " optimizer.base_lr or stage.max_grad_norm, or raise stage.kl_coef"
        )


def eos_token_id(policy: CausalTransformer, *, stop_at_eos: bool) -> int | None:
    """The id of EOS, None without `stop_at_eos`. Raises ConfigError if the tokenizer has no EOS."""
    if not stop_at_eos:
        return None
    if policy.tokenizer.eos_token_id is None:
        raise ConfigError(
            "sampler.stop_at_eos=true needs a tokenizer with an end-of-sequence token"
        )
    return int(policy.tokenizer.eos_token_id)


def have_ended(
    completions: Completions, tokenizer: PreTrainedTokenizerBase
) -> Bool[Tensor, " batch"]:
    """True for each completion whose last real token is EOS."""
    last = completions.mask.sum(dim=1, keepdim=True) - 1
    return completions.tokens.gather(1, last).squeeze(1) == tokenizer.eos_token_id

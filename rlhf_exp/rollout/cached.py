"""The fast sampler: one decoding loop over a key-value cache.

A prompt that all rows share is run once. Log-probs, values and hidden states come from the decoding
passes, so the policy does not run again over the samples. Rows that ended leave the batch. On a
GPU, where launching a kernel takes longer than running it, they stay, and a step is a captured
graph. If a cache would change what the policy computes, every step runs over the whole sequence.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.hf import Cache
from rlhf_exp.models.cache import decoding_cache
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rollout.sampler import (
    Drawn,
    Sampler,
    as_completions,
    check_finite,
    draw,
    eos_token_id,
)
from rlhf_exp.rollout.static import StaticDecoder
from rlhf_exp.settings import settings
from rlhf_exp.types import Generation, PromptBatch

# Buffers and graphs are kept for this many shapes; prompts of many widths would fill the memory.
MAX_SHAPES = 8


@settings
class CachedSampler(Sampler):
    """Samples with a key-value cache through the plain module; model.engine may be fast or
    hooked."""

    cuda_graphs: bool = True
    """On a GPU a decoding step is replayed as a captured graph; false: run by Python."""

    @cached_property
    def _decoders(self) -> dict[Any, StaticDecoder]:
        return {}

    def decoder(
        self, policy: TransformerWithValueHead, batch: int, prompt_len: int
    ) -> StaticDecoder:
        """The decoder of fixed shapes for `batch` rows and prompts of `prompt_len` tokens, built on
        first use; one for each policy, shape and intervention."""
        key = (policy, batch, prompt_len, policy.is_working, policy.edits)
        if key not in self._decoders:
            if len(self._decoders) == MAX_SHAPES:
                self._decoders.clear()
            self._decoders[key] = StaticDecoder(policy, self, batch, prompt_len)
        return self._decoders[key]

    @torch.no_grad()
    def __call__(
        self, policy: TransformerWithValueHead, prompts: PromptBatch, generator: torch.Generator
    ) -> Generation:
        """Completions of the prompts; rows that ended hold 0 and are not computed further."""
        eos = eos_token_id(policy, stop_at_eos=self.stop_at_eos)
        batch, prompt_len = prompts.tokens.shape
        attended = None if bool(prompts.mask.all()) else prompts.mask
        cache, hidden = prefill(policy, prompts, attended, prompt_len + self.gen_len)
        uniforms = torch.rand((batch, self.gen_len), generator=generator, device=hidden.device)
        if self.cuda_graphs and policy.device.type == "cuda" and policy.fast_paths.static:
            assert cache is not None
            decoder = self.decoder(policy, batch, prompt_len)
            return decoder.run(prompts, cache, hidden, uniforms, eos=eos)
        return self._decode(policy, prompts, attended, cache, hidden, uniforms, eos=eos)

    def _decode(
        self,
        policy: TransformerWithValueHead,
        prompts: PromptBatch,
        attended: Tensor | None,
        cache: Cache | None,
        hidden: Tensor,
        uniforms: Tensor,
        *,
        eos: int | None,
    ) -> Generation:
        active = torch.arange(len(hidden), device=hidden.device)
        steps = _Steps(len(hidden), self.gen_len)
        sequences = prompts.tokens  # active rows: the new tokens, or all without a cache
        for t in range(self.gen_len):
            drawn = draw(self, policy, hidden, uniforms[:, t])
            steps.add(active, hidden, drawn)
            tokens = drawn.tokens
            if eos is not None and bool((ended := tokens == eos).any()):
                unfinished = (~ended).nonzero().squeeze(-1)
                active, tokens = active[unfinished], tokens[unfinished]
                uniforms, sequences = uniforms[unfinished], sequences[unfinished]
                attended = None if attended is None else attended[unfinished]
                if cache is not None:
                    cache.reorder_cache(unfinished)
            if t + 1 == self.gen_len or not len(active):
                break
            if attended is not None:
                attended = torch.cat([attended, torch.ones_like(attended[:, :1])], dim=1)
            new, prompt_len = tokens[:, None], 0
            if cache is None:
                new = sequences = torch.cat([sequences, new], dim=1)
                prompt_len = prompts.tokens.shape[1]
            hidden = policy.hidden_states(new, attended, cache, prompt_len=prompt_len)[:, -1]
        return steps.generation(policy, prompts)


@dataclass
class _Steps:
    """Results of the decoding loop, one entry a step, for the rows active in that step."""

    batch: int
    length: int
    rows: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)

    def add(self, rows: Tensor, hidden: Tensor, drawn: Drawn) -> None:
        self.rows.append(rows)
        self.hidden.append(hidden)
        self.drawn.append(drawn)

    def generation(self, policy: TransformerWithValueHead, prompts: PromptBatch) -> Generation:
        """The generation; positions after a row's end hold 0."""
        rows = torch.cat(self.rows)
        columns = torch.cat([row.new_full(row.shape, t) for t, row in enumerate(self.rows)])

        def spread(entries: Tensor) -> Tensor:
            padded = entries.new_zeros((self.batch, self.length, *entries.shape[1:]))
            return padded.index_put((rows, columns), entries)

        hidden = torch.cat(self.hidden)
        tokens, logprobs, kept_mass = (torch.cat(x) for x in zip(*self.drawn, strict=True))
        check_finite(logprobs)
        mask = spread(torch.ones_like(rows, dtype=torch.bool))
        values = policy.values(hidden)
        return Generation(
            completions=as_completions(policy, prompts, spread(tokens), mask),
            logprobs=spread(logprobs),
            values=None if values is None else spread(values),
            hidden=spread(hidden),
            kept_mass=spread(kept_mass),
        )


def prefill(
    policy: TransformerWithValueHead, prompts: PromptBatch, attended: Tensor | None, length: int
) -> tuple[Cache | None, Tensor]:
    """The cache of the prompts, with room for `length` tokens, and the last hidden state of each
    [batch d_model]; the prompt of a group runs once. `attended` is the prompts' mask, None without
    padding. The cache is None if it would change what the policy computes."""
    paths = policy.fast_paths
    rows, index = prompts.distinct() if paths.one_prompt else (None, None)
    tokens, mask = prompts.tokens, attended
    if rows is not None:
        tokens, mask = tokens[rows], None if mask is None else mask[rows]
    cache = decoding_cache(policy.language_model, length) if paths.cache else None
    hidden = policy.hidden_states(tokens, mask, cache, prompt_len=tokens.shape[1])[:, -1]
    if index is not None:
        if cache is not None:
            cache.reorder_cache(index)
        hidden = hidden[index]
    return cache, hidden

"""The fast sampler: one decoding loop over a key-value cache.

A prompt that all rows share is run once. Log-probs, values and hidden states are taken from the
decoding pass itself, so the policy is not run again over what it sampled. Rows that ended leave
the batch; on a GPU, where launching work takes longer than the work, they stay, and a step is a
captured graph. Where a policy computes something else with a cache, every step is a pass over all
that was sampled so far.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from rlhf_exp.hf import Cache
from rlhf_exp.models.cache import decoding_cache
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rollout.sampler import Drawn, Sampler, as_completions, check_finite, draw, eos_token
from rlhf_exp.rollout.static import StaticDecoder, StaticDecoders
from rlhf_exp.settings import settings
from rlhf_exp.types import Generation, PromptBatch


@settings
class CachedSampler(Sampler):
    """Samples with a key-value cache through the plain module, whatever the engine."""

    cuda_graphs: bool = True
    """On a GPU a decoding step is replayed as a captured graph; false: run by Python."""

    @cached_property
    def _decoders(self) -> StaticDecoders:
        return StaticDecoders(self)

    @torch.no_grad()
    def __call__(
        self, policy: TransformerWithValueHead, prompts: PromptBatch, generator: torch.Generator
    ) -> Generation:
        """Completions of the prompts; rows that ended hold 0 and are computed no further."""
        eos = eos_token(policy, stop_at_eos=self.stop_at_eos)
        batch, prompt_len = prompts.tokens.shape
        seen = None if bool(prompts.mask.all()) else prompts.mask
        cache, hidden = prefill(policy, prompts, seen, prompt_len + self.gen_len)
        uniforms = torch.rand((batch, self.gen_len), generator=generator, device=hidden.device)
        if self.cuda_graphs and policy.device.type == "cuda" and policy.fast_paths.static:
            assert cache is not None
            decoder = self._decoders.get(policy, batch, prompt_len)
            return decode_static(decoder, policy, prompts, cache, hidden, uniforms, eos=eos)
        return self._decode(policy, prompts, seen, cache, hidden, uniforms, eos=eos)

    def _decode(
        self,
        policy: TransformerWithValueHead,
        prompts: PromptBatch,
        seen: Tensor | None,
        cache: Cache | None,
        hidden: Tensor,
        uniforms: Tensor,
        *,
        eos: int | None,
    ) -> Generation:
        active = torch.arange(len(hidden), device=hidden.device)
        steps = _Steps(len(hidden), self.gen_len)
        before = prompts.tokens  # of the active rows, all that the next pass does not find cached
        for t in range(self.gen_len):
            drawn = draw(self, policy, hidden, uniforms[:, t])
            steps.add(active, hidden, drawn)
            tokens = drawn.tokens
            if eos is not None and bool((ended := tokens == eos).any()):
                going_on = (~ended).nonzero().squeeze(-1)
                active, tokens, uniforms = active[going_on], tokens[going_on], uniforms[going_on]
                seen = None if seen is None else seen[going_on]
                before = before[going_on]
                if cache is not None:
                    cache.reorder_cache(going_on)
            if t + 1 == self.gen_len or not len(active):
                break
            if seen is not None:
                seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
            new, prompt_len = tokens[:, None], 0
            if cache is None:
                new = before = torch.cat([before, new], dim=1)
                prompt_len = prompts.tokens.shape[1]
            hidden = policy.hidden_states(new, seen, cache, prompt_len=prompt_len)[:, -1]
        return steps.generation(policy, prompts)


@dataclass
class _Steps:
    """What the decoding loop has computed, step by step, of the rows active then."""

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
        """Everything by row and column; what no row reached stays 0."""
        rows = torch.cat(self.rows)
        columns = torch.cat([row.new_full(row.shape, t) for t, row in enumerate(self.rows)])

        def spread(entries: Tensor) -> Tensor:
            whole = entries.new_zeros((self.batch, self.length, *entries.shape[1:]))
            return whole.index_put((rows, columns), entries)

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
    policy: TransformerWithValueHead, prompts: PromptBatch, seen: Tensor | None, length: int
) -> tuple[Cache | None, Tensor]:
    """The cache over the prompts, with room for `length` tokens, and the hidden state after each;
    of equal rows only one is run. `seen` is the prompts' mask, None if nothing is padding. There is
    no cache for a policy that computes something else with one."""
    batch, paths = prompts.tokens.shape[0], policy.fast_paths
    rows = 1 if paths.one_prompt and prompts.is_one else batch
    cache = decoding_cache(policy.language_model, length) if paths.cache else None
    mask = None if seen is None else seen[:rows]
    tokens = prompts.tokens[:rows]
    hidden = policy.hidden_states(tokens, mask, cache, prompt_len=tokens.shape[1])[:, -1]
    if rows < batch:
        if cache is not None:
            cache.reorder_cache(torch.zeros(batch, dtype=torch.long, device=hidden.device))
        hidden = hidden.expand(batch, -1)
    return cache, hidden


def decode_static(
    decoder: StaticDecoder,
    policy: TransformerWithValueHead,
    prompts: PromptBatch,
    cache: Cache,
    hidden: Tensor,
    uniforms: Tensor,
    *,
    eos: int | None,
) -> Generation:
    """The generation by steps of fixed shapes."""
    columns = decoder.run(prompts.mask, cache, hidden, uniforms, eos=eos)
    check_finite(columns.logprobs.where(columns.mask, 0))
    mask, values = columns.mask, policy.values(columns.hidden)
    return Generation(
        completions=as_completions(policy, prompts, columns.tokens * mask, mask),
        logprobs=columns.logprobs.where(mask, 0),
        values=None if values is None else values.where(mask, 0),
        hidden=columns.hidden.where(mask[..., None], 0),
        kept_mass=columns.kept_mass.where(mask, 0),
    )

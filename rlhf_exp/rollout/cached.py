"""The fast sampler: one decoding loop over a key-value cache.

A prompt that all rows share is run once. Log-probs, values and hidden states are taken from the
decoding pass itself, so the policy is not run again over what it sampled. Rows that ended leave
the batch.
"""

import torch
from torch import Tensor

from rlhf_exp.functional.sampling import sample_tokens
from rlhf_exp.hf import Cache
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rollout.sampler import Sampler, as_completions, check_logits, eos_token, kept_mass
from rlhf_exp.settings import settings
from rlhf_exp.types import Generation, PromptBatch


@settings
class CachedSampler(Sampler):
    """Samples with a key-value cache through the plain module, whatever the engine."""

    @torch.no_grad()
    def __call__(
        self, policy: TransformerWithValueHead, prompts: PromptBatch, generator: torch.Generator
    ) -> Generation:
        """Completions of the prompts; rows that ended hold 0 and are computed no further."""
        eos = eos_token(policy, stop_at_eos=self.stop_at_eos)
        cache, hidden = _prefill(policy, prompts)
        batch = prompts.tokens.shape[0]
        columns = _Columns(batch, self.gen_len, hidden)
        seen = prompts.mask
        active = torch.arange(batch, device=hidden.device)
        for t in range(self.gen_len):
            logits = policy.unembed(hidden).float()
            check_logits(logits)
            filtered = self.filter(logits)
            tokens = sample_tokens(filtered, generator)
            logprobs = (logits / self.temperature).log_softmax(dim=-1)
            columns.tokens[active, t] = tokens
            columns.mask[active, t] = True
            columns.logprobs[active, t] = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
            columns.values[active, t] = policy.values(hidden).float()
            columns.hidden[active, t] = hidden
            if self.truncates:
                columns.kept_mass[active, t] = kept_mass(logprobs, filtered)
            if eos is not None and (tokens == eos).any():
                going_on = (tokens != eos).nonzero().squeeze(-1)
                active, tokens, seen = active[going_on], tokens[going_on], seen[going_on]
                cache.batch_select_indices(going_on)
            if t + 1 == self.gen_len or not len(active):
                break
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
            hidden = policy.hidden_states(tokens[:, None], seen, cache)[:, -1]
        return columns.generation(policy, prompts)


class _Columns:
    """Tensors that the decoding loop fills column by column; what no row reaches stays 0."""

    def __init__(self, batch: int, length: int, hidden: Tensor) -> None:
        zeros = hidden.new_zeros((batch, length), dtype=torch.float32)
        self.tokens = zeros.long()
        self.mask = zeros.bool()
        self.logprobs = zeros.clone()
        self.values = zeros.clone()
        self.kept_mass = zeros + 1
        self.hidden = hidden.new_zeros((batch, length, hidden.shape[-1]))

    def generation(self, policy: TransformerWithValueHead, prompts: PromptBatch) -> Generation:
        return Generation(
            completions=as_completions(policy, prompts, self.tokens, self.mask),
            logprobs=self.logprobs,
            values=self.values,
            hidden=self.hidden,
            kept_mass=self.kept_mass * self.mask,
        )


def _prefill(policy: TransformerWithValueHead, prompts: PromptBatch) -> tuple[Cache, Tensor]:
    """The cache over the prompts and the hidden state after each; of equal rows only one is run."""
    from transformers import DynamicCache

    batch = prompts.tokens.shape[0]
    shared = bool((prompts.tokens == prompts.tokens[:1]).all() and prompts.mask.all())
    rows = 1 if shared else batch
    cache = DynamicCache(config=policy.language_model.config)
    hidden = policy.hidden_states(prompts.tokens[:rows], prompts.mask[:rows], cache)[:, -1]
    if shared and batch > 1:
        cache.batch_repeat_interleave(batch)
        hidden = hidden.expand(batch, -1)
    return cache, hidden

"""The slow sampler: TransformerLens' own generation, then one hooked pass over the samples.

Tests compare the cached sampler with it.
"""

import torch
from jaxtyping import Int
from pydantic import model_validator
from torch import Tensor

from rlhf_exp.functional.logprobs import completion_logits, completion_part, token_logprobs
from rlhf_exp.hf import TransformerBridge
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rollout.sampler import (
    Sampler,
    as_completions,
    check_finite,
    eos_token_id,
    kept_mass,
    through_first_eos,
)
from rlhf_exp.settings import settings
from rlhf_exp.types import Generation, PromptBatch


@settings
class BridgeSampler(Sampler):
    """Samples with `TransformerBridge.generate`; model.engine may be fast or hooked."""

    @model_validator(mode="after")
    def _one_filter(self) -> "BridgeSampler":
        if self.top_k is not None and self.top_p < 1:
            raise ValueError(
                f"top_k={self.top_k} and top_p={self.top_p}: TransformerLens applies only one of"
                " them; set one, or use sampler=cached"
            )
        return self

    @torch.no_grad()
    def __call__(
        self, policy: TransformerWithValueHead, prompts: PromptBatch, generator: torch.Generator
    ) -> Generation:
        """Completions of the prompts; every row runs to gen_len."""
        eos = eos_token_id(policy, stop_at_eos=self.stop_at_eos)
        prompt_len = prompts.tokens.shape[1]
        hidden = policy.hidden_states(prompts.tokens, prompts.mask, prompt_len=prompt_len)
        check_finite(policy.unembed(hidden[:, -1]))
        tokens = self._generate(policy, prompts, generator, eos=eos)
        completions = as_completions(policy, prompts, tokens, through_first_eos(tokens, eos))
        tokens, mask = completions.sequences
        with policy.edits.in_bridge(mask, prompt_len) as hooks:
            logits, values, hidden = policy.view.run_with_value_head(
                policy.value_head, tokens, mask, hooks
            )
        logits = completion_logits(logits, prompt_len).float()
        mask = completions.mask
        mass = mask.float()
        if self.truncates:
            logprobs = (logits / self.temperature).log_softmax(dim=-1).flatten(0, 1)
            mass = kept_mass(logprobs, self.filter(logits.flatten(0, 1))).view_as(mass) * mask
        return Generation(
            completions=completions,
            logprobs=token_logprobs(logits / self.temperature, completions.tokens) * mask,
            values=None if values is None else completion_part(values, prompt_len).float() * mask,
            hidden=completion_part(hidden, prompt_len) * mask[..., None],
            kept_mass=mass,
        )

    def _generate(
        self,
        policy: TransformerWithValueHead,
        prompts: PromptBatch,
        generator: torch.Generator,
        *,
        eos: int | None,
    ) -> Int[Tensor, "batch completion"]:
        """The sampled tokens, 0 after the step at which the last row ended."""
        prompt_len = prompts.tokens.shape[1]

        def generate(bridge: TransformerBridge) -> Tensor:
            with bridge.hooks(fwd_hooks=hooks):
                return bridge.generate(
                    prompts.tokens,
                    max_new_tokens=self.gen_len,
                    stop_at_eos=eos is not None,
                    eos_token_id=eos,
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p if self.top_p < 1 else None,
                    attention_mask=prompts.mask.long(),
                    use_past_kv_cache=not hooks,  # the hooks need passes over whole sequences
                    return_type="tokens",
                    verbose=False,
                )

        # TransformerLens draws from the global generator: seed that from ours for the call.
        seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
        with torch.random.fork_rng(), policy.edits.in_bridge(prompts.mask, prompt_len) as hooks:
            torch.manual_seed(seed)
            tokens = policy.view.call(generate)[:, prompt_len:]
        return torch.nn.functional.pad(tokens, (0, self.gen_len - tokens.shape[1]))

"""The slow sampler: TransformerLens' own generation, then one hooked pass over what it sampled.

It is the oracle that the cached sampler is held against.
"""

import torch
from pydantic import model_validator

from rlhf_exp.functional.logprobs import completion_logits, completion_part, token_logprobs
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rollout.sampler import (
    Sampler,
    as_completions,
    check_finite,
    eos_token,
    kept_mass,
    through_first_eos,
)
from rlhf_exp.settings import settings
from rlhf_exp.types import Generation, PromptBatch


@settings
class BridgeSampler(Sampler):
    """Samples with `TransformerBridge.generate`, whatever the engine."""

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
        """Completions of the prompts; every row is computed to gen_len."""
        eos = eos_token(policy, stop_at_eos=self.stop_at_eos)
        prompt_len = prompts.tokens.shape[1]
        check_finite(policy.unembed(policy.hidden_states(prompts.tokens, prompts.mask)[:, -1]))
        # TransformerLens draws from the global generator; give it one of our stream for the call.
        seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            generated = policy.view.call(
                lambda bridge: bridge.generate(
                    prompts.tokens,
                    max_new_tokens=self.gen_len,
                    stop_at_eos=eos is not None,
                    eos_token_id=eos,
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p if self.top_p < 1 else None,
                    attention_mask=prompts.mask.long(),
                    return_type="tokens",
                    verbose=False,
                )
            )
        tokens = generated[:, prompt_len:].clone()
        tokens = torch.nn.functional.pad(tokens, (0, self.gen_len - tokens.shape[1]))
        completions = as_completions(policy, prompts, tokens, through_first_eos(tokens, eos))
        logits, values, hidden = policy.view.run_with_value_head(
            policy.value_head, *completions.sequences
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

"""Engines: they run the policy's passes in learning.

The fast engine runs the plain Hugging Face module and computes only what the losses need. The
hooked engine runs the same parameters through TransformerBridge and computes every logit, as in
textbooks; tests require that both agree.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_exp.functional.logprobs import (
    completion_logits,
    completion_part,
    entropy,
    kl_divergence,
    token_logprobs,
)
from rlhf_exp.kernels.vocab_head import Head, token_statistics, unembed
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.types import Layout, Pass, Rollout

EngineName = Literal["fast", "hooked"]
LogitsAndValues = tuple[Float[Tensor, "batch seq vocab"], Float[Tensor, "batch seq"] | None]


@dataclass(frozen=True)
class FastEngine:
    """Runs a shared prompt once, no padding after the longest completion, and the head only on real
    tokens, one tile of the vocabulary at a time."""

    is_plain: ClassVar[bool] = True
    """True if passes run the plain module; bf16, compilation, gradient checkpointing and adapters
    need it."""
    transformer: CausalTransformer

    def logits_and_values(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        *,
        prompt_len: int | None = None,
    ) -> LogitsAndValues:
        """Logits and values at every position; the first `prompt_len` tokens are the prompt."""
        hidden = self.transformer.hidden_states(tokens, mask, prompt_len=prompt_len)
        return self.transformer.unembed(hidden), self.transformer.values(hidden)

    def learning_pass(
        self, rollout: Rollout, ref_head: Head, layout: Layout, *, temperature: float
    ) -> Pass:
        """The pass over a rollout's completions, of layout `layout`, by kernels.vocab_head: never
        with the logits of a whole batch. `ref_head` is the reference's unembedding."""
        model, completions = self.transformer, rollout.completions
        with model.learning_head() as head:
            hidden = layout.pick(model.completion_states(completions, layout))
        with model.autocast():
            statistics = token_statistics(
                hidden,
                head,
                layout.pick(completions.tokens),
                layout.pick(rollout.ref_hidden),
                ref_head,
                temperature=temperature,
            )
        values = model.values(hidden)
        return Pass(
            logprobs=layout.spread(statistics.logprobs),
            entropy=layout.spread(statistics.entropy),
            kl=layout.spread(statistics.kl),
            values=None if values is None else layout.spread(values),
        )


@dataclass(frozen=True)
class HookedEngine:
    """Runs TransformerBridge, with the value head as a hook function."""

    is_plain: ClassVar[bool] = False
    transformer: CausalTransformer

    def logits_and_values(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        *,
        prompt_len: int | None = None,
    ) -> LogitsAndValues:
        """FastEngine's logits and values, computed by the bridge."""
        model = self.transformer
        with model.edits.in_bridge(mask, prompt_len) as hooks:
            return model.view.run_with_value_head(model.value_head, tokens, mask, hooks)[:2]

    def learning_pass(
        self, rollout: Rollout, ref_head: Head, layout: Layout, *, temperature: float
    ) -> Pass:
        """FastEngine's learning pass, computed by `textbook_pass`."""
        prompt_len = rollout.completions.prompt_len
        sequences = rollout.completions.sequences
        logits, values = self.logits_and_values(*sequences, prompt_len=prompt_len)
        return textbook_pass(logits, values, rollout, ref_head, temperature=temperature)


ENGINES: dict[EngineName, type[FastEngine] | type[HookedEngine]] = {
    "fast": FastEngine,
    "hooked": HookedEngine,
}


def textbook_pass(
    logits: Float[Tensor, "batch seq vocab"],
    values: Float[Tensor, "batch seq"] | None,
    rollout: Rollout,
    ref_head: Head,
    *,
    temperature: float,
) -> Pass:
    """The pass computed from the logits of all positions at once."""
    completions = rollout.completions
    start = completions.prompt_len
    logits = completion_logits(logits, start).float() / temperature
    with torch.no_grad():
        ref_logits = unembed(rollout.ref_hidden, ref_head).float() / temperature
    return Pass(
        logprobs=token_logprobs(logits, completions.tokens),
        entropy=entropy(logits),
        kl=kl_divergence(logits, ref_logits),
        values=None if values is None else completion_part(values, start).float(),
    )

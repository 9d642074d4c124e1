"""The policy: a causal language model with a value head on its final hidden states."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase, TransformerBridge
from rlhf_exp.models.engines import ENGINES, EngineName
from rlhf_exp.models.hooked import boot_bridge
from rlhf_exp.models.lora import has_adapter, merged_copy
from rlhf_exp.models.transformer import CausalTransformer


class TransformerWithValueHead(CausalTransformer):
    """The policy. Its value head is Linear(d, 4 d), ReLU, Linear(4 d, 1) on the output of the final
    layer norm, always in fp32. With value_head=False there is none, and values are None. `engine`
    runs the passes of learning.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        engine: EngineName = "fast",
        value_head: bool = True,
    ) -> None:
        super().__init__(language_model, tokenizer)
        d_model = language_model.get_output_embeddings().weight.shape[1]
        if value_head:
            self.value_head = nn.Sequential(
                nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, 1)
            ).to(language_model.device)
        self.engine = ENGINES[engine](self)

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"] | None = None,
        *,
        prompt_len: int | None = None,
    ) -> tuple[Float[Tensor, "batch seq vocab"], Float[Tensor, "batch seq"] | None]:
        """Logits and values at every position; without a mask there is no padding."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        return self.engine.logits_and_values(tokens, mask, prompt_len=prompt_len)

    def hooked(self) -> TransformerBridge:
        """A TransformerBridge over the current weights, to look inside the policy.

        It shares the policy's memory. On architectures whose adapter copies weights (GPT-NeoX) it
        holds the weights of the time of the call, so call it again after an optimizer step. Leave
        it in evaluation mode: `bridge.train()` turns GPT-2's dropouts on. With LoRA it wraps a
        merged copy.
        """
        model = self.language_model
        return boot_bridge(merged_copy(model) if has_adapter(model) else model, self.tokenizer)


def initialise_value_head(
    value_head: nn.Module, *, generator: torch.Generator, zero_last: bool
) -> None:
    """Draws the value head's weights from the generator. With zero_last the last layer is 0, so
    that every value starts at exactly 0."""
    linears = [layer for layer in value_head.children() if isinstance(layer, nn.Linear)]
    for linear in linears:
        draw_linear(linear, generator)
    if zero_last:
        nn.init.zeros_(linears[-1].weight)
        nn.init.zeros_(linears[-1].bias)


def draw_linear(linear: nn.Linear, generator: torch.Generator) -> None:
    """Draws weight and bias from the CPU generator with nn.Linear's default distribution: uniform
    within 1/sqrt(inputs)."""
    bound = linear.in_features**-0.5
    with torch.no_grad():
        for parameter in (linear.weight, linear.bias):
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(drawn)

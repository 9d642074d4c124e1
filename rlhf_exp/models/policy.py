"""The policy: a causal language model with a value head on its final hidden states."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase, TransformerBridge
from rlhf_exp.models.engines import ENGINES, EngineName
from rlhf_exp.models.hooked import boot_bridge
from rlhf_exp.models.lora import has_adapter, merged_copy
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.types import Completions, Layout


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
        self.value_trunk: CausalTransformer | None = None
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

    def detach_values(self) -> None:
        """From now on the value loss has no gradient for the language model."""
        assert self.value_head is not None
        self.value_head.register_forward_pre_hook(lambda head, args: (args[0].detach(),))

    def separate_values(self) -> None:
        """From now on values come from a trained copy of the language model, by
        `completion_values`; `values` returns None."""
        trunk = CausalTransformer(copy.deepcopy(self.language_model), self.tokenizer)
        trunk.fast_paths = self.fast_paths
        trunk.requires_grad_(True)
        model = trunk.language_model
        if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
            model.get_output_embeddings().requires_grad_(False)
        self.value_trunk = trunk

    def values(self, hidden: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes"] | None:
        """Values of final hidden states; None without a value head or with one on a separate
        trunk."""
        return super().values(hidden) if self.value_trunk is None else None

    def completion_values(
        self, completions: Completions, layout: Layout
    ) -> Float[Tensor, "batch completion"]:
        """The values of each token of the completions, from the separate trunk; padding holds 0."""
        assert self.value_trunk is not None
        hidden = layout.pick(self.value_trunk.completion_states(completions, layout))
        values = super().values(hidden)
        assert values is not None
        return layout.spread(values)

    def compute_in(self, dtype: torch.dtype) -> None:
        """As CausalTransformer does, for the value trunk too."""
        super().compute_in(dtype)
        if self.value_trunk is not None:
            self.value_trunk.compute_in(dtype)

    def working(self) -> AbstractContextManager[object]:
        """As CausalTransformer does, for the value trunk too."""
        if self.value_trunk is None:
            return super().working()
        stack = ExitStack()
        stack.enter_context(super().working())
        stack.enter_context(self.value_trunk.working())
        return stack

    def working_copies(self) -> Iterator[Tensor]:
        """As CausalTransformer does, for the value trunk too."""
        yield from super().working_copies()
        if self.value_trunk is not None:
            yield from self.value_trunk.working_copies()

    def weights_changed(self) -> None:
        """As CausalTransformer does, for the value trunk too."""
        super().weights_changed()
        if self.value_trunk is not None:
            self.value_trunk.weights_changed()

    def checkpoint_gradients(self) -> None:
        """As CausalTransformer does, for the value trunk too."""
        super().checkpoint_gradients()
        if self.value_trunk is not None:
            self.value_trunk.checkpoint_gradients()

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

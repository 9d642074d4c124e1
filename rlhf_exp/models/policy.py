"""The policy: a causal language model with a value head on its final hidden states.

It knows tensors of token ids. Position ids follow the mask, so left padding changes nothing.
Dropout is off, always: with it on, the first PPO ratio is not 1.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_exp.hf import Cache, PreTrainedModel, PreTrainedTokenizerBase, TransformerBridge
from rlhf_exp.models.hooked import HookedView, boot_bridge
from rlhf_exp.models.lora import has_adapter, merged_copy
from rlhf_exp.settings import ConfigError

Engine = Literal["fast", "hooked"]


class CausalTransformer(nn.Module):
    """A causal language model taken apart into final hidden states and unembedding."""

    def __init__(self, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.language_model = language_model
        self.tokenizer = tokenizer
        self._recomputed: list[Any] = []
        self.train(False)

    def train(self, mode: bool = True) -> "CausalTransformer":
        """Sets the mode of everything but the language model, which stays in evaluation mode."""
        super().train(mode)
        self.language_model.eval()
        return self

    def checkpoint_gradients(self) -> None:
        """From now on the backward pass computes each block's activations again in place of keeping
        them: less memory, a third more time in learning, the same gradients. Raises ConfigError for
        an architecture that has no such blocks."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        # Not by transformers' own switch, which has gradients reach the embeddings even where all
        # blocks below the last are frozen.
        self._recomputed = [
            m for m in self.language_model.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        if not self._recomputed:
            raise ConfigError(
                f"stage.gradient_checkpointing=true: {type(self.language_model).__name__} has no"
                " blocks that transformers can recompute; set it false"
            )
        for block in self._recomputed:
            block._gradient_checkpointing_func = partial(_run_checkpointed, block)

    @contextmanager
    def _recomputing(self, *, cached: bool) -> Iterator[None]:
        # transformers checkpoints a block only in training mode, and drops its cache then. The
        # blocks' own flags are set: dropouts that are modules of theirs stay off.
        blocks = self._recomputed if torch.is_grad_enabled() and not cached else []
        for block in blocks:
            block.training = block.gradient_checkpointing = True
        try:
            yield
        finally:
            for block in blocks:
                block.training = block.gradient_checkpointing = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.device

    @property
    def context_len(self) -> int:
        """Tokens that the model can attend to."""
        return int(self.language_model.config.max_position_embeddings)

    def hidden_states(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch _"],
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """The final layer norm's output, for every token or, with a cache, for those not in it.

        `mask` covers the cached tokens and the new ones; `tokens` are the new ones alone.
        """
        new = tokens.shape[1]
        with self._recomputing(cached=cache is not None):
            output = self.language_model.base_model(
                input_ids=tokens,
                attention_mask=mask.long(),
                position_ids=position_ids(mask)[:, -new:],
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return output.last_hidden_state

    def last_layers(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], count: int
    ) -> tuple[Float[Tensor, "batch seq d_model"], ...]:
        """The outputs of the last `count` blocks, the final one's after the final layer norm."""
        output = self.language_model.base_model(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=position_ids(mask),
            output_hidden_states=True,
            use_cache=False,
        )
        return (*output.hidden_states[-count:-1], output.last_hidden_state)

    def unembed(self, hidden: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes vocab"]:
        """Logits from final hidden states."""
        return self.language_model.get_output_embeddings()(hidden)


class TransformerWithValueHead(CausalTransformer):
    """The policy. Its value head is Linear(d, 4 d), ReLU, Linear(4 d, 1) on the output of the final
    layer norm, in fp32 whatever the language model is in.

    engine="fast" runs the plain Hugging Face module; engine="hooked" runs the same parameters
    through TransformerBridge, the value head as a hook function.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        engine: Engine = "fast",
    ) -> None:
        super().__init__(language_model, tokenizer)
        d_model = language_model.get_output_embeddings().weight.shape[1]
        self.engine = engine
        self.value_head = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, 1)
        ).to(language_model.device)
        self._view: HookedView | None = None

    @property
    def view(self) -> HookedView:
        """TransformerLens over the current weights, for calls; built at the first use."""
        if self._view is None:
            self._view = HookedView(self.language_model, self.tokenizer)
        return self._view

    def forward(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None
    ) -> tuple[Float[Tensor, "batch seq vocab"], Float[Tensor, "batch seq"]]:
        """Logits and values at every position; no mask means that nothing is padding."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if self.engine == "hooked":
            logits, values, _ = self.view.run_with_value_head(self.value_head, tokens, mask)
            return logits, values
        hidden = self.hidden_states(tokens, mask)
        return self.unembed(hidden), self.values(hidden)

    def values(self, hidden: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes"]:
        """The value head on final hidden states."""
        return self.value_head(hidden.float()).squeeze(-1)

    def hooked(self) -> TransformerBridge:
        """A TransformerBridge over the current weights, for looking inside.

        It shares the policy's memory. On architectures whose adapter copies weights (GPT-NeoX) it
        shows the weights of this moment, so ask again after an optimizer step. Leave it in
        evaluation mode: `bridge.train()` switches GPT-2's dropouts on. With adapters it is over a
        merged copy.
        """
        model = self.language_model
        return boot_bridge(merged_copy(model) if has_adapter(model) else model, self.tokenizer)

    def frozen_reference(self) -> CausalTransformer:
        """A copy of the language model as it is now that nothing trains."""
        reference = CausalTransformer(copy.deepcopy(self.language_model), self.tokenizer)
        return reference.requires_grad_(False)


def _run_checkpointed(block: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    block.training = False  # it brought us here; OPT's blocks would take it for their dropout's
    return checkpoint(forward, *args, use_reentrant=False)


def position_ids(mask: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """0, 1, 2, ... over each row's real tokens; 0 in the padding on the left."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def initialise_value_head(
    value_head: nn.Sequential, *, generator: torch.Generator, zero_last: bool
) -> None:
    """Draws the value head's weights anew from the generator; zero_last makes every value start at
    exactly 0."""
    linears = [layer for layer in value_head if isinstance(layer, nn.Linear)]
    for linear in linears:
        draw_linear(linear, generator)
    if zero_last:
        nn.init.zeros_(linears[-1].weight)
        nn.init.zeros_(linears[-1].bias)


def draw_linear(linear: nn.Linear, generator: torch.Generator) -> None:
    """Draws weight and bias anew from the generator, which is a CPU's, with PyTorch's distribution
    of nn.Linear: uniform within 1/sqrt(inputs)."""
    bound = linear.in_features**-0.5
    with torch.no_grad():
        for parameter in (linear.weight, linear.bias):
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(drawn)

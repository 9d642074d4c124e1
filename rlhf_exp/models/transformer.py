"""A causal language model as final hidden states and unembedding, with fast passes for both.

Knows tensors of token ids. Position ids follow the mask, so left padding changes nothing. Dropout
is always off: with dropout the first PPO ratio is not 1.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_exp.hf import Cache, PreTrainedModel, PreTrainedTokenizerBase
from rlhf_exp.kernels.attention import ATTENTION
from rlhf_exp.kernels.vocab_head import Head, unembed
from rlhf_exp.kernels.working_weights import WorkingWeights
from rlhf_exp.models.cache import context_len, prompt_cache, repeated
from rlhf_exp.models.editing import Editing, Edits
from rlhf_exp.models.head_scale import measure_unembedding
from rlhf_exp.models.hooked import HookedView
from rlhf_exp.settings import ConfigError
from rlhf_exp.types import Completions, Layout, PromptBatch

# Running a shared prompt once needs a second pass through the blocks. It pays if it saves at least
# this share of the batch's positions.
WORTH_A_PASS = 0.25

# Attention implementations whose masks are True at attended keys. Others add masks to the scores.
BOOLEAN_MASKS = ("sdpa", ATTENTION)


@dataclass(frozen=True)
class FastPaths:
    """The shortcuts that give the numbers of plain passes on an architecture: `cache`, decoding
    with a key-value cache; `one_prompt`, running a shared prompt once; `static`, decoding by steps
    of fixed shapes. `models.fast_paths` tests them. Without them everything works, but slower."""

    cache: bool = True
    one_prompt: bool = True
    static: bool = True


class CausalTransformer(nn.Module):
    """A causal language model split into final hidden states and unembedding. Raises ConfigError if
    the unembedding is more than a matrix, a scale and a soft cap."""

    def __init__(self, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.language_model = language_model
        self.tokenizer = tokenizer
        self.fast_paths = FastPaths()
        self.value_head: nn.Module | None = None  # a policy's
        self.edits = Edits()  # an intervention's; none by default
        self._view: HookedView | None = None
        self._recomputed: list[Any] = []
        self._compiled: tuple[Callable[..., Any], ...] = ()  # a tuple, so as not to be a submodule
        self.autocast_dtype: torch.dtype | None = None  # None: no autocast
        self._working: WorkingWeights | None = None
        self.train(False)
        self._unembedding = measure_unembedding(language_model)

    def train(self, mode: bool = True) -> "CausalTransformer":
        """Sets the mode of all modules except the language model, which stays in evaluation
        mode."""
        super().train(mode)
        self.language_model.eval()
        return self

    def compute_in(self, dtype: torch.dtype) -> None:
        """From now on passes run under autocast to `dtype`; layer norms, softmaxes, logits and the
        weights stay fp32. Call it after finetune.attach, which chooses the trained weights."""
        self.autocast_dtype = self._working = None
        if dtype != torch.float32:
            self.autocast_dtype = dtype
            head = self.head.weight
            self._working = WorkingWeights(self.language_model, dtype, excluded=head)

    def autocast(self) -> AbstractContextManager[object]:
        """The context of this model's passes."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def working(self) -> AbstractContextManager[object]:
        """A context in which the model uses low-precision copies of its weights: parameters() then
        returns the copies, not the trained weights."""
        return nullcontext() if self._working is None else self._working.in_use()

    def working_copies(self) -> Iterator[Tensor]:
        """The low-precision copies that `working` uses."""
        return iter(()) if self._working is None else self._working.parameters()

    @property
    def is_working(self) -> bool:
        """True while the low-precision copies are in use."""
        return self._working is not None and self._working.active

    def weights_changed(self) -> None:
        """Refreshes the low-precision copies; call it after an optimizer step within `working`."""
        if self._working is not None:
            self._working.refresh()

    def compile_passes(self) -> None:
        """From now on the passes of learning run compiled. Every new shape compiles again."""
        self._compiled = (torch.compile(self.language_model.base_model, dynamic=False),)

    @property
    def is_compiled(self) -> bool:
        """True after `compile_passes`."""
        return bool(self._compiled)

    def checkpoint_gradients(self) -> None:
        """From now on the backward pass recomputes each block's activations instead of storing
        them: less memory, a third more time in learning, the same gradients. Raises ConfigError for
        an architecture without such blocks."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        # Not with transformers' own switch, which sends gradients down to the embeddings even if
        # only the last blocks are trained.
        blocks = [
            m for m in self.language_model.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        # Only the outermost: in a recomputed block, inner blocks must run as they did before.
        inner = {m for block in blocks for m in block.modules() if m is not block}
        self._recomputed = [block for block in blocks if block not in inner]
        if not self._recomputed:
            raise ConfigError(
                f"gradient_checkpointing=true: {type(self.language_model).__name__}"
                " has no blocks that transformers can recompute; set it false"
            )

    @contextmanager
    def _recomputing(self, edit_context: Editing, *, cached: bool) -> Iterator[None]:
        # transformers checkpoints a block only in training mode, and then drops its cache. This
        # sets only the blocks' own flags: dropout modules inside them stay off.
        blocks = self._recomputed if torch.is_grad_enabled() and not cached else []
        for block in blocks:
            block.training = block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(_run_checkpointed, block, edit_context)
        try:
            yield
        finally:
            for block in blocks:
                block.training = block.gradient_checkpointing = False
                del block._gradient_checkpointing_func

    @contextmanager
    def learning_head(self) -> Iterator[Head]:
        """`head` with the buffer to which kernels.vocab_head adds the gradient of its weight.
        Within the block the input embedding's gradient is sparse: only the rows of its tokens."""
        head, embedding = self.head, self.language_model.get_input_embeddings()
        weights = [w for w in (head.weight, embedding.weight) if w.requires_grad]
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        if isinstance(embedding, nn.Embedding):
            embedding.sparse = embedding.weight.requires_grad
        try:
            yield head._replace(gradient=head.weight.grad)
        finally:
            if isinstance(embedding, nn.Embedding):
                embedding.sparse = False

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.language_model.device

    @property
    def context_len(self) -> int:
        """The largest number of tokens of a prompt with its completion."""
        return context_len(self.language_model)

    def hidden_states(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch _"] | None,
        cache: Cache | None = None,
        *,
        prompt_len: int | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """The final layer norm's output for `tokens`. With a cache, `tokens` are only the new ones.

        `mask` covers the cached and the new tokens; None: no padding on the left. The first
        `prompt_len` tokens belong to the prompt; an intervention at prompt or completion needs this
        number.
        """
        pass_inputs = {}
        if mask is not None:
            pass_inputs["attention_mask"] = mask.long()
            pass_inputs["position_ids"] = position_ids(mask)[:, -tokens.shape[1] :]
        return self._states(tokens, cache, pass_inputs, self.edits.during(tokens, mask, prompt_len))

    def static_states(
        self,
        tokens: Int[Tensor, "batch 1"],
        allowed: Bool[Tensor, "batch 1 1 keys"],
        positions: Int[Tensor, "batch 1"],
        cache: Cache,
    ) -> Float[Tensor, "batch 1 d_model"]:
        """The final hidden states of one token a row, from its position and the mask of the keys
        that it may attend to. Never makes the host wait for the GPU."""
        mask = allowed
        if self.language_model.config._attn_implementation not in BOOLEAN_MASKS:
            lowest = torch.finfo(self.language_model.dtype).min
            mask = torch.zeros_like(allowed, dtype=self.language_model.dtype)
            mask = mask.masked_fill(~allowed, lowest)
        pass_inputs = {"attention_mask": mask, "position_ids": positions}
        return self._states(tokens, cache, pass_inputs, self.edits.during(tokens, None, 0))

    def _states(
        self,
        tokens: Tensor,
        cache: Cache | None,
        pass_inputs: dict[str, Tensor],
        edit_context: Editing,
    ) -> Tensor:
        # Embeds here: transformers may scan token ids for padding, which syncs the GPU. A compiled
        # pass also cannot have sparse gradients.
        needs_grad = cache is None and torch.is_grad_enabled()
        compiled = self._compiled and needs_grad
        forward = self._compiled[0] if compiled else self.language_model.base_model
        recomputing = self._recomputing(edit_context, cached=cache is not None)
        with self.autocast(), edit_context(), recomputing:
            embedded = self.language_model.get_input_embeddings()(tokens)
            output = forward(
                inputs_embeds=embedded,
                past_key_values=cache,
                use_cache=cache is not None,
                **pass_inputs,
            )
        states: Tensor = output.last_hidden_state
        return states

    def completion_states(
        self, completions: Completions, layout: Layout
    ) -> Float[Tensor, "batch num_columns d_model"]:
        """The final hidden states from which the completions' tokens are predicted, up to the
        layout's last column. A prompt that all rows share is run once."""
        prompts, last = completions.prompts, layout.num_columns - 1
        tokens, mask = completions.tokens[:, :last], completions.mask[:, :last]
        width = prompts.tokens.shape[1]
        saved = (1 - 1 / len(tokens)) * width / (width + last)
        one_prompt = layout.one_prompt and self.fast_paths.one_prompt
        if one_prompt and saved >= WORTH_A_PASS and not (self._recomputed or layout.whole):
            cache = prompt_cache(self.language_model)
            if cache is not None:
                return self._shared_prompt_states(prompts, tokens, mask, cache, layout)
        full_mask = torch.cat([prompts.mask, mask], dim=1) if layout.padded_prompts else None
        tokens = torch.cat([prompts.tokens, tokens], dim=1)
        return self.hidden_states(tokens, full_mask, prompt_len=width)[:, width - 1 :]

    def _shared_prompt_states(
        self, prompts: PromptBatch, tokens: Tensor, mask: Tensor, cache: Cache, layout: Layout
    ) -> Tensor:
        prompt_mask = full_mask = None
        if layout.padded_prompts:
            prompt_mask, full_mask = prompts.mask[:1], torch.cat([prompts.mask, mask], dim=1)
        width = prompts.tokens.shape[1]
        prompt_state = self.hidden_states(prompts.tokens[:1], prompt_mask, cache, prompt_len=width)
        prompt_state = prompt_state[:, -1:].expand(len(tokens), -1, -1)
        if not tokens.shape[1]:
            return prompt_state
        of_all = repeated(cache, len(tokens))
        states = self.hidden_states(tokens, full_mask, of_all, prompt_len=0)
        return torch.cat([prompt_state, states], dim=1)

    def last_layers(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], count: int
    ) -> tuple[Float[Tensor, "batch seq d_model"], ...]:
        """The outputs of the last `count` blocks; the last of them after the final layer norm."""
        output = self.language_model.base_model(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=position_ids(mask),
            output_hidden_states=True,
            use_cache=False,
        )
        return (*output.hidden_states[-count:-1], output.last_hidden_state)

    def unembed(self, hidden: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes vocab"]:
        """Logits from final hidden states, always in fp32."""
        return unembed(hidden, self.head)

    @property
    def view(self) -> HookedView:
        """Calls of TransformerLens with the current weights; built on first use."""
        if self._view is None:
            self._view = HookedView(self.language_model, self.tokenizer)
        return self._view

    def values(self, hidden: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes"] | None:
        """Values of final hidden states; None without a value head."""
        if self.value_head is None:
            return None
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float()).squeeze(-1)

    def frozen_reference(self) -> "CausalTransformer":
        """A frozen copy of the current language model; it owns only copies of the trained
        weights."""
        model = self.language_model
        frozen = [p for p in model.parameters() if not p.requires_grad]
        shared = {id(tensor): tensor for tensor in (*frozen, *model.buffers())}
        other = CausalTransformer(copy.deepcopy(model, shared), self.tokenizer)
        other.fast_paths = self.fast_paths
        return other.requires_grad_(False)

    @property
    def head(self) -> Head:
        """The output embedding with the model's scale and soft cap, for kernels.vocab_head."""
        embedding = self.language_model.get_output_embeddings()
        scale, cap = self._unembedding
        return Head(embedding.weight, embedding.bias, scale=scale, cap=cap)


def _run_checkpointed(
    block: nn.Module, edit_context: Editing, forward: Callable[..., Any], *args: Any
) -> Any:
    block.training = False  # it was True only to select this function; OPT would apply dropout
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), edit_context())
    )


def position_ids(mask: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """0, 1, 2, ... over each row's real tokens; 0 in the padding on the left."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)

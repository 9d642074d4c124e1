"""A causal language model as final hidden states and unembedding, and fast ways to compute them.

It knows tensors of token ids. Position ids follow the mask, so left padding changes nothing.
Dropout is off, always: with it on, the first PPO ratio is not 1.
"""

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
from rlhf_exp.models.cache import context_len, prompt_cache
from rlhf_exp.models.editing import Editing, Edits
from rlhf_exp.models.hooked import HookedView
from rlhf_exp.models.unembedding import measure_unembedding
from rlhf_exp.settings import ConfigError
from rlhf_exp.types import Completions, Layout, PromptBatch

# The share of a batch's positions that running a prompt once for all rows must save to pay for the
# second pass through the blocks.
WORTH_A_PASS = 0.25

# Attention that takes masks that are True for what is attended to. Others add them to the scores.
BOOLEAN_MASKS = ("sdpa", ATTENTION)


@dataclass(frozen=True)
class FastPaths:
    """Which shortcuts give the numbers of plain passes on an architecture: decoding with a
    key-value cache, running a prompt that all rows share once, decoding by steps of fixed shapes.
    `models.probing` finds out; everything works without them, more slowly."""

    cache: bool = True
    one_prompt: bool = True
    static: bool = True


class CausalTransformer(nn.Module):
    """A causal language model taken apart into final hidden states and unembedding. Raises
    ConfigError for one whose unembedding is more than a matrix, a scale and a soft cap."""

    def __init__(self, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.language_model = language_model
        self.tokenizer = tokenizer
        self.fast_paths = FastPaths()
        self.value_head: nn.Module | None = None  # a policy's
        self.edits = Edits()  # those of an intervention, none by default
        self._view: HookedView | None = None
        self._recomputed: list[Any] = []
        self._compiled: tuple[Callable[..., Any], ...] = ()  # not a submodule: it is the same one
        self.low: torch.dtype | None = None  # what autocast casts passes to, None for nothing
        self._working: WorkingWeights | None = None
        self.train(False)
        self._unembedding = measure_unembedding(language_model)

    def train(self, mode: bool = True) -> "CausalTransformer":
        """Sets the mode of everything but the language model, which stays in evaluation mode."""
        super().train(mode)
        self.language_model.eval()
        return self

    def compute_in(self, dtype: torch.dtype) -> None:
        """From now on passes compute in `dtype` as autocast has it; layer norms, softmaxes, logits
        and the weights stay fp32. Call it after finetune.attach, which chooses what is trained."""
        low = dtype != torch.float32
        self.low = dtype if low else None
        besides = self.head.weight
        self._working = (
            WorkingWeights(self.language_model, dtype, excluded=besides) if low else None
        )

    def autocast(self) -> AbstractContextManager[object]:
        """The context of this model's passes."""
        if self.low is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.low)

    def working(self) -> AbstractContextManager[object]:
        """Swaps the low-precision copies of the weights in. Within this context parameters() are
        the copies, not the trained weights."""
        return nullcontext() if self._working is None else self._working.in_use()

    def working_copies(self) -> Iterator[Tensor]:
        """The copies of weights that `working` puts in use."""
        return iter(()) if self._working is None else self._working.parameters()

    @property
    def is_working(self) -> bool:
        """Whether this is within `working`, other weights being in use than outside of it."""
        return self._working is not None and self._working.active

    def weights_changed(self) -> None:
        """To be called after an optimizer step within `working`."""
        if self._working is not None:
            self._working.refresh()

    def compile_passes(self) -> None:
        """From now on the passes of learning run compiled. Shapes must not vary: each one is
        compiled anew."""
        self._compiled = (torch.compile(self.language_model.base_model, dynamic=False),)

    @property
    def is_compiled(self) -> bool:
        """Whether `compile_passes` was called."""
        return bool(self._compiled)

    def checkpoint_gradients(self) -> None:
        """From now on the backward pass computes each block's activations again in place of keeping
        them: less memory, a third more time in learning, the same gradients. Raises ConfigError for
        an architecture that has no such blocks."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        # Not by transformers' own switch, which has gradients reach the embeddings even where all
        # blocks below the last are frozen.
        blocks = [
            m for m in self.language_model.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        # The outermost ones: when one runs again, a block within it must run as it did before.
        inner = {m for block in blocks for m in block.modules() if m is not block}
        self._recomputed = [block for block in blocks if block not in inner]
        if not self._recomputed:
            raise ConfigError(
                f"stage.compute.gradient_checkpointing=true: {type(self.language_model).__name__}"
                " has no blocks that transformers can recompute; set it false"
            )

    @contextmanager
    def _recomputing(self, editing: Editing, *, cached: bool) -> Iterator[None]:
        # transformers checkpoints a block only in training mode, and drops its cache then. The
        # blocks' own flags are set: dropouts that are modules of theirs stay off.
        blocks = self._recomputed if torch.is_grad_enabled() and not cached else []
        for block in blocks:
            block.training = block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(_run_checkpointed, block, editing)
        try:
            yield
        finally:
            for block in blocks:
                block.training = block.gradient_checkpointing = False
                del block._gradient_checkpointing_func

    @contextmanager
    def learning_head(self) -> Iterator[Head]:
        """`head` with the buffer that functional.vocab_head adds its weights' gradient to. Within
        the block the input embedding's gradient is sparse: only the rows of its tokens."""
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
        """Where the weights are."""
        return self.language_model.device

    @property
    def context_len(self) -> int:
        """Tokens that a prompt and its completion may have together."""
        return context_len(self.language_model)

    def hidden_states(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch _"] | None,
        cache: Cache | None = None,
        *,
        prompt_len: int | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """The final layer norm's output, for every token or, with a cache, for those not in it.

        `mask` covers the cached tokens and the new ones, None means that nothing on the left is
        padding; `tokens` are the new ones only. The first `prompt_len` of them belong to the
        prompt; an intervention at prompt or completion needs it.
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
        """The final hidden states of one token a row, given the keys that it attends to and its
        position. Nothing here makes the host wait for a GPU."""
        mask = allowed
        if self.language_model.config._attn_implementation not in BOOLEAN_MASKS:  # it adds masks
            lowest = torch.finfo(self.language_model.dtype).min
            mask = torch.zeros_like(allowed, dtype=self.language_model.dtype)
            mask = mask.masked_fill(~allowed, lowest)
        pass_inputs = {"attention_mask": mask, "position_ids": positions}
        return self._states(tokens, cache, pass_inputs, self.edits.during(tokens, None, 0))

    def _states(
        self, tokens: Tensor, cache: Cache | None, pass_inputs: dict[str, Tensor], editing: Editing
    ) -> Tensor:
        # The embedding apart: given token ids, transformers may look for padding in them, which on
        # a GPU makes the host wait, and a compiled pass could not have sparse gradients.
        learning = cache is None and torch.is_grad_enabled()
        run = self._compiled[0] if self._compiled and learning else self.language_model.base_model
        with self.autocast(), editing(), self._recomputing(editing, cached=cache is not None):
            embedded = self.language_model.get_input_embeddings()(tokens)
            output = run(
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
        """The final hidden states from which the completions' tokens were sampled, up to the
        layout's last column. A prompt that all rows share is run once."""
        prompts, last = completions.prompts, layout.num_columns - 1
        tokens, mask = completions.tokens[:, :last], completions.mask[:, :last]
        width = prompts.tokens.shape[1]
        saved = (1 - 1 / len(tokens)) * width / (width + last)
        one_prompt = layout.one_prompt and self.fast_paths.one_prompt
        if one_prompt and saved >= WORTH_A_PASS and not (self._recomputed or layout.whole):
            cache = prompt_cache(self.language_model)
            if cache is not None:
                return self._after_one_prompt(prompts, tokens, mask, cache, layout)
        whole = torch.cat([prompts.mask, mask], dim=1) if layout.padded_prompts else None
        tokens = torch.cat([prompts.tokens, tokens], dim=1)
        return self.hidden_states(tokens, whole, prompt_len=width)[:, width - 1 :]

    def _after_one_prompt(
        self, prompts: PromptBatch, tokens: Tensor, mask: Tensor, cache: Cache, layout: Layout
    ) -> Tensor:
        before = whole = None
        if layout.padded_prompts:
            before, whole = prompts.mask[:1], torch.cat([prompts.mask, mask], dim=1)
        width = prompts.tokens.shape[1]
        first = self.hidden_states(prompts.tokens[:1], before, cache, prompt_len=width)
        first = first[:, -1:].expand(len(tokens), -1, -1)
        if not tokens.shape[1]:
            return first
        for layer in cache.layers:
            layer.keys = layer.keys.expand(len(tokens), -1, -1, -1)
            layer.values = layer.values.expand(len(tokens), -1, -1, -1)
        return torch.cat([first, self.hidden_states(tokens, whole, cache, prompt_len=0)], dim=1)

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
        """Logits from final hidden states, fp32 whatever the passes compute in."""
        return unembed(hidden, self.head)

    @property
    def view(self) -> HookedView:
        """TransformerLens over the current weights, for calls; built at the first use."""
        if self._view is None:
            self._view = HookedView(self.language_model, self.tokenizer)
        return self._view

    def values(self, hidden: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes"] | None:
        """The value head on final hidden states; None without a head."""
        if self.value_head is None:
            return None
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float()).squeeze(-1)

    def frozen(self, twin: PreTrainedModel) -> "CausalTransformer":
        """A copy of this language model, which takes the same fast paths and is not trained."""
        other = CausalTransformer(twin, self.tokenizer)
        other.fast_paths = self.fast_paths
        return other.requires_grad_(False)

    @property
    def head(self) -> Head:
        """The output embedding with the model's scale and soft cap, as functional.vocab_head
        takes it."""
        embedding = self.language_model.get_output_embeddings()
        scale, cap = self._unembedding
        return Head(embedding.weight, embedding.bias, scale=scale, cap=cap)


def _run_checkpointed(
    block: nn.Module, editing: Editing, forward: Callable[..., Any], *args: Any
) -> Any:
    block.training = False  # True only selects this function; OPT would apply dropout
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), editing())
    )


def position_ids(mask: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """0, 1, 2, ... over each row's real tokens; 0 in the padding on the left."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)

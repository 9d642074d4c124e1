"""Decoding by steps with fixed shapes and memory, so that a GPU can replay a step as a graph.

A step reads no tensor on the host, which only sets the number of steps. Rows that ended run on to
the end, and their results are masked.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.hf import Cache
from rlhf_exp.models.cache import fill_static_cache, static_cache
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.transformer import position_ids
from rlhf_exp.rollout.sampler import (
    Sampler,
    as_completions,
    check_finite,
    draw,
    through_first_eos,
)
from rlhf_exp.types import Generation, PromptBatch

# Steps between checks whether all rows have ended; each check makes the host wait.
CHECK_EVERY = 16


class StaticDecoder:
    """The buffers of one decoding step, and on a GPU its graph."""

    def __init__(
        self, policy: TransformerWithValueHead, sampler: Sampler, batch: int, prompt_len: int
    ) -> None:
        self._policy, self._sampler, self._prompt_len = policy, sampler, prompt_len
        shape, width = (batch, sampler.gen_len), policy.head.weight.shape[1]
        zeros = partial(torch.zeros, device=policy.device)
        self._allowed = zeros((batch, 1, 1, prompt_len + sampler.gen_len), dtype=torch.bool)
        self._step, self._slot = zeros(1, dtype=torch.long), zeros(1, dtype=torch.long)
        self._positions = zeros((batch, 1), dtype=torch.long)
        self._tokens = zeros(shape, dtype=torch.long)
        self._uniforms, self._logprobs, self._kept_mass = (zeros(shape) for _ in range(3))
        self._last: Tensor | None = None
        self._hidden = zeros((*shape, width))
        self._cache: Cache | None = None
        self._graph: Any = None

    def run(
        self,
        prompts: PromptBatch,
        cache: Cache,
        hidden: Tensor,
        uniforms: Tensor,
        *,
        eos: int | None,
    ) -> Generation:
        """The generation from `cache`, which holds the prompts' keys and values, and `hidden`
        [batch d_model], their last states."""
        self._load(prompts.mask, cache, hidden, uniforms)
        if self._graph is None and hidden.is_cuda:
            self._capture()
            self._load(prompts.mask, cache, hidden, uniforms)
        for t in range(self._sampler.gen_len):
            if self._graph is None:
                self._advance()
            else:
                self._graph.replay()
            if eos is not None and (t + 1) % CHECK_EVERY == 0:
                ended = torch.eq(self._tokens[:, : t + 1], eos).any(dim=1)
                if bool(ended.all()):
                    break
        mask = through_first_eos(self._tokens, eos)
        check_finite(self._logprobs.where(mask, 0))
        values = self._policy.values(self._hidden)
        # Copies: the next call overwrites the buffers.
        return Generation(
            completions=as_completions(self._policy, prompts, self._tokens, mask),
            logprobs=self._logprobs.where(mask, 0),
            values=None if values is None else values.where(mask, 0),
            hidden=self._hidden.where(mask[..., None], 0),
            kept_mass=self._kept_mass.where(mask, 0),
        )

    def _load(self, prompt_mask: Tensor, cache: Cache, hidden: Tensor, uniforms: Tensor) -> None:
        if self._cache is None or self._last is None:
            length, model = self._allowed.shape[-1], self._policy.language_model
            self._cache = static_cache(model, cache, length, self._slot)
            self._last = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            self._hidden = self._hidden.to(hidden.dtype)
        fill_static_cache(self._cache, cache)
        self._last.copy_(hidden)
        self._allowed.zero_()
        self._allowed[:, 0, 0, : self._prompt_len] = prompt_mask
        self._positions.copy_(position_ids(prompt_mask)[:, -1:] + 1)
        self._uniforms.copy_(uniforms)
        self._step.zero_()
        self._slot.fill_(self._prompt_len)

    def _advance(self) -> None:
        """One step: samples a token a row from the last states, then computes the next states."""
        assert self._last is not None
        assert self._cache is not None
        uniforms = self._uniforms.index_select(1, self._step).squeeze(1)
        drawn = draw(self._sampler, self._policy, self._last, uniforms)
        self._hidden.index_copy_(1, self._step, self._last[:, None])
        self._tokens.index_copy_(1, self._step, drawn.tokens[:, None])
        self._logprobs.index_copy_(1, self._step, drawn.logprobs[:, None])
        self._kept_mass.index_copy_(1, self._step, drawn.kept_mass[:, None])
        self._allowed.index_fill_(3, self._slot, True)
        states = self._policy.static_states(
            drawn.tokens[:, None], self._allowed, self._positions, self._cache
        )
        self._last.copy_(states[:, -1])
        self._step += 1
        self._slot += 1
        self._positions += 1

    def _capture(self) -> None:
        # As PyTorch's notes on CUDA graphs ask: a step on another stream first, whose results are
        # not used, so that libraries allocate their memory before the capture. Without autocast's
        # cache of converted weights, which is freed before the graph is.
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._advance()
                self._step.zero_()
                self._slot.fill_(self._prompt_len)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may use the device during the capture: a reward, a checkpoint's copy.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._advance()

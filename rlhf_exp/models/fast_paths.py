"""Tests on a loaded model which fast passes give the same numbers as its plain pass.

Knows the passes of `CausalTransformer`, not architectures: a shortcut that gives other numbers is
not used, and a model that gives other numbers without any shortcut is refused.
"""

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_exp.functional.logprobs import logits_agree
from rlhf_exp.models.cache import decoding_cache, prompt_cache, static_cache
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.transformer import BOOLEAN_MASKS, CausalTransformer, FastPaths
from rlhf_exp.settings import ConfigError
from rlhf_exp.types import Completions, Layout, PromptBatch

log = logging.getLogger(__name__)

M = TypeVar("M", bound=CausalTransformer)

# Architectures whose cache is right only for some weights, which training changes: transformers
# 5.23 clamps Zamba2's time steps in full passes (time_step_min), but not in decoding.
UNTRUSTED = {"zamba2"}

PROMPT, COMPLETION = 5, 2  # tokens; fewer if the context is shorter
SHORTER_BY = 2  # the short row's prompt has this many tokens fewer


class States(NamedTuple):
    """Final hidden states [rows columns d_model] of `rows`, from the column `start` on."""

    hidden: Tensor
    rows: list[int]
    start: int


class Probe:
    """Three short sequences and their logits from plain passes. Two share a prompt and need no
    padding; the third has a shorter prompt and a shorter completion."""

    def __init__(self, model: CausalTransformer) -> None:
        self.model = model
        self.tokens, self.mask, self.width = _sequences(model)
        vocab = model.head.weight.shape[0]
        self.expected = torch.zeros((*self.tokens.shape, vocab), device=model.device)
        self.expected[:2] = self._plain(self.tokens[:2])
        self.expected[2, self.mask[2]] = self._plain(self.tokens[2:, self.mask[2]])[0]

    def _plain(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        return self.model.language_model(input_ids=tokens, use_cache=False).logits.float()

    def passes_agree(self, check: Callable[["Probe"], Iterator[States]]) -> bool:
        """Returns True if `check` gives the plain pass's logits at every real token; False if it
        raises."""
        hidden, expected = [], []
        try:
            for states in check(self):
                end = states.start + states.hidden.shape[1]
                real = self.mask[states.rows, states.start : end]
                hidden.append(states.hidden[real])
                expected.append(self.expected[states.rows, states.start : end][real])
            logits = self.model.unembed(torch.cat(hidden))
        except Exception as error:  # an unsupported pass may raise anything
            log.debug("%s: %s: %s", check.__name__, type(error).__name__, error)
            return False
        return logits_agree(logits, torch.cat(expected), dtype=self.model.language_model.dtype)


def with_fast_paths(model: M) -> M:
    """The model with the fast paths that are right on it. Raises ConfigError as `find_fast_paths`
    does."""
    model.fast_paths = find_fast_paths(model)
    return model


@torch.no_grad()
def find_fast_paths(model: CausalTransformer, *, static: bool | None = None) -> FastPaths:
    """The fast paths that are right on a newly loaded model. Decoding by steps of fixed shapes is
    tried only if `static`, by default on a GPU. Raises ConfigError naming the architecture if
    padding or later tokens change its logits."""
    probe, name = Probe(model), type(model.language_model).__name__
    if not probe.passes_agree(padded):
        reason = (
            "padding on the left of a prompt changes what it computes after it"
            if probe.passes_agree(without_head)
            else "its final hidden states and output embedding do not give its logits"
        )
        raise ConfigError(f"model: {name} is not supported: {reason}")
    cache = model.language_model.config.model_type not in UNTRUSTED and probe.passes_agree(decoded)
    one_prompt = cache and probe.passes_agree(after_one_prompt)
    if not one_prompt:  # after_one_prompt also shows that decoding needs no mask
        cache = cache and probe.passes_agree(decoded_without_mask)
    if not cache:
        if not probe.passes_agree(by_prefixes):
            raise ConfigError(
                f"model: {name} is not supported: what it computes at a token depends on later ones"
            )
        log.warning(
            "%s gives other logits with a key-value cache: sampling does not use one and is slower",
            name,
        )  # fmt: skip
    static = model.device.type == "cuda" if static is None else static
    return FastPaths(
        cache=cache,
        one_prompt=one_prompt,
        static=static and cache and probe.passes_agree(static_steps),
    )


@torch.no_grad()
def check_hooked(policy: TransformerWithValueHead) -> None:
    """Raises ConfigError if TransformerLens cannot run the policy or gives other logits."""
    probe, view = Probe(policy), policy.view

    def viewed(probe: Probe) -> Iterator[States]:
        head = policy.value_head
        yield States(view.run_with_value_head(head, probe.tokens, probe.mask)[2], [0, 1, 2], 0)

    if not probe.passes_agree(viewed):
        raise ConfigError(
            f"TransformerLens and transformers compute different logits for"
            f" {type(policy.language_model).__name__}: use model.engine=fast and sampler=cached"
        )


@torch.no_grad()
def supports_packing(model: CausalTransformer) -> bool:
    """Returns True if sequences packed into one row, each with positions from 0, have the same
    logits as in separate rows."""
    probe = Probe(model)
    long, short = probe.tokens[0], probe.tokens[2, probe.mask[2]]
    if len(long) + len(short) > model.context_len:
        return True  # two sequences never fit into a row
    tokens = torch.stack([torch.cat([long, short]), torch.cat([short, long])])
    lengths = ((len(long), len(short)), (len(short), len(long)))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    logits = model.language_model(
        input_ids=tokens, position_ids=positions.to(tokens.device), use_cache=False
    ).logits
    expected = (probe.expected[0], probe.expected[2, probe.mask[2]])
    both = torch.stack([torch.cat(expected), torch.cat(expected[::-1])])
    return logits_agree(logits, both, dtype=model.language_model.dtype)


def without_head(probe: Probe) -> Iterator[States]:
    """A pass without the output embedding."""
    yield States(probe.model.hidden_states(probe.tokens[:1], None), [0], 0)


def padded(probe: Probe) -> Iterator[States]:
    """A pass over rows of different lengths."""
    yield States(probe.model.hidden_states(probe.tokens, probe.mask), [0, 1, 2], 0)


def decoded(probe: Probe) -> Iterator[States]:
    """Decodes prompts, one of them padded, with a cache from which ended rows are removed."""
    return _decode(probe, [2, 0], probe.mask)


def decoded_without_mask(probe: Probe) -> Iterator[States]:
    """Decodes prompts that need no padding."""
    return _decode(probe, [0, 1], None)


def _decode(
    probe: Probe, rows: list[int], mask: Bool[Tensor, "batch seq"] | None
) -> Iterator[States]:
    model, width = probe.model, probe.width
    cache = decoding_cache(model.language_model, probe.tokens.shape[1])
    prompt_mask = None if mask is None else mask[rows, :width]
    hidden = model.hidden_states(probe.tokens[rows, :width], prompt_mask, cache)
    yield States(hidden[:, -1:], rows, width - 1)
    for column in range(width, probe.tokens.shape[1]):
        unfinished = probe.mask[rows, column]
        if not bool(unfinished.all()):
            cache.reorder_cache(unfinished.nonzero().flatten())
            rows = [row for row, real in zip(rows, unfinished.tolist(), strict=True) if real]
        attended = None if mask is None else mask[rows, : column + 1]
        hidden = model.hidden_states(probe.tokens[rows, column : column + 1], attended, cache)
        yield States(hidden, rows, column)


def by_prefixes(probe: Probe) -> Iterator[States]:
    """A pass for each token in which it is the last one."""
    for column in range(probe.width - 1, probe.tokens.shape[1]):
        prefix = slice(0, column + 1)
        hidden = probe.model.hidden_states(probe.tokens[:, prefix], probe.mask[:, prefix])
        yield States(hidden[:, -1:], [0, 1, 2], column)


def after_one_prompt(probe: Probe) -> Iterator[States]:
    """Runs a prompt once and two rows after it: their completions in one pass, or only the first
    token by decoding if the model has no `prompt_cache`."""
    model, width = probe.model, probe.width
    tokens, mask = probe.tokens[:2], probe.mask[:2]
    if prompt_cache(model.language_model) is not None:
        prompts = PromptBatch(
            tokens=tokens[:, :width], mask=mask[:, :width], rows=({"prompt": ""},) * 2
        )
        shared = Completions(
            prompts=prompts, tokens=tokens[:, width:], mask=mask[:, width:], texts=("",) * 2
        )
        yield States(model.completion_states(shared, Layout.of(shared)), [0, 1], width - 1)
        return
    cache = decoding_cache(model.language_model, tokens.shape[1])
    model.hidden_states(tokens[:1, :width], None, cache)
    cache.reorder_cache(torch.zeros(2, dtype=torch.long, device=tokens.device))
    step = model.hidden_states(tokens[:, width : width + 1], None, cache)
    yield States(step, [0, 1], width)


def static_steps(probe: Probe) -> Iterator[States]:
    """Decodes with a static cache whose unwritten slots are masked."""
    model, rows, width = probe.model, [0, 2], probe.width
    attention = model.language_model.config._attn_implementation
    if attention not in (*BOOLEAN_MASKS, "eager"):
        raise NotImplementedError(f"masks of {attention}")
    if prompt_cache(model.language_model) is None:
        raise NotImplementedError("layers that do not keep all keys and values")
    tokens, mask = probe.tokens[rows], probe.mask[rows]
    length = tokens.shape[1]
    cache = decoding_cache(model.language_model, length)
    model.hidden_states(tokens[:, :width], mask[:, :width], cache)
    slot = torch.tensor([width], device=tokens.device)
    # Two slots stay unwritten, as when all rows end early.
    fixed = static_cache(model.language_model, cache, length + 2, slot)
    slots = torch.arange(length + 2, device=tokens.device)
    real = torch.nn.functional.pad(mask, (0, 2), value=True)[:, None, None]
    positions = mask[:, :width].sum(dim=1, keepdim=True)
    for column in range(width, length):
        allowed = real & (slots <= column)
        hidden = model.static_states(tokens[:, column : column + 1], allowed, positions, fixed)
        yield States(hidden, rows, column)
        slot += 1
        positions += 1


def _sequences(model: CausalTransformer) -> tuple[Tensor, Tensor, int]:
    """Tokens and mask [3, seq], and the width of the prompts. Prompts are padded on the left,
    completions on the right."""
    length = max(2, min(PROMPT + COMPLETION, model.context_len))
    width = min(PROMPT, length - 1)
    special = set(model.tokenizer.all_special_ids)
    words = [i for i in range(min(len(model.tokenizer), 1000)) if i not in special] or [0]
    index = torch.randint(len(words), (3, length), generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor(words)[index]
    tokens[1, :width] = tokens[0, :width]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[2, : min(SHORTER_BY, width - 1)] = False
    mask[2, width + 1 :] = False
    return (tokens * mask).to(model.device), mask.to(model.device), width

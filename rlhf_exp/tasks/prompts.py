"""Prompt texts as batches of tokens, and an endless stream of them."""

from collections.abc import Iterator, Sequence

import torch

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.batches import pad_left
from rlhf_exp.tasks.encoding import encode, leading_ids
from rlhf_exp.types import PromptBatch


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    prepend_bos: bool,
    device: torch.device | str = "cpu",
) -> PromptBatch:
    """The texts left-padded, no special tokens but the BOS that is asked for.

    Raises ConfigError for a tokenizer without BOS, and for a text of no tokens.
    """
    bos = leading_ids(tokenizer, prepend_bos=prepend_bos)
    rows = [bos + ids for ids in encode(tokenizer, texts)] if texts else []
    if not rows or not all(rows):
        raise ConfigError("task: a prompt has no tokens; give it text or set task.prepend_bos=true")
    tokens = pad_left(rows, fill=0)
    mask = pad_left([[1] * len(row) for row in rows], fill=0).bool()
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return PromptBatch(
        tokens=tokens.to(device), mask=mask.to(device), rows=tuple({"prompt": t} for t in decoded)
    )


def take(prompts: PromptBatch, index: torch.Tensor) -> PromptBatch:
    """The rows at `index`, without columns that are padding in all of them."""
    batch = prompts[index]
    width = int(batch.mask.sum(dim=1).max())
    return PromptBatch(
        tokens=batch.tokens[:, -width:], mask=batch.mask[:, -width:], rows=batch.rows
    )


def prompt_stream(
    prompts: PromptBatch, batch_size: int, generator: torch.Generator
) -> Iterator[PromptBatch]:
    """Batches without end: all prompts in a random order, then in another, batches running across
    the seams."""
    pending = torch.empty(0, dtype=torch.long)
    while True:
        while len(pending) < batch_size:
            pending = torch.cat([pending, torch.randperm(len(prompts.rows), generator=generator)])
        yield take(prompts, pending[:batch_size])
        pending = pending[batch_size:]

"""Prompts as batches of tokens, and an endless stream of batches."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.batches import pad_left
from rlhf_exp.tasks.encoding import encode, leading_ids
from rlhf_exp.tasks.protocol import Conversation, Prompt, PromptRow, ShapesPrompts
from rlhf_exp.types import PromptBatch


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    prepend_bos: bool | None,
    device: torch.device | str = "cpu",
    shaping: ShapesPrompts | None = None,
) -> PromptBatch:
    """The prompts as a left-padded batch. A text has no special tokens except BOS, if required; a
    conversation is rendered by the tokenizer's chat template, up to where the answer begins.

    `shaping` drops or cuts prompts by their tokens. Raises ConfigError if the tokenizer lacks a
    required BOS or chat template, for a prompt without tokens, and if no prompt is left.
    """
    rows = [row if isinstance(row, PromptRow) else PromptRow(row, {}) for row in prompts]
    encoded = _encode_rows(tokenizer, rows, prepend_bos=prepend_bos)
    lengths = [len(ids) for ids in encoded]
    if shaping is not None:
        shaped = [
            (row, shaping.shape_prompt(row, ids)) for row, ids in zip(rows, encoded, strict=True)
        ]
        rows = [row for row, ids in shaped if ids is not None]
        encoded = [list(ids) for _, ids in shaped if ids is not None]
    if not rows:
        fix = "; widen task.min_tokens and task.max_tokens"
        span = f": they have {min(lengths)} to {max(lengths)} tokens{fix}" if lengths else ""
        raise ConfigError(f"task: none of {len(prompts)} prompts is left{span}")
    for row, ids in zip(rows, encoded, strict=True):
        if not ids:
            raise ConfigError(
                f"task: the prompt {reprlib.repr(row.prompt)} has no tokens; give it text, or BOS"
                " with task.prepend_bos=true"
            )
    tokens = pad_left(encoded, fill=0)
    mask = pad_left([[1] * len(ids) for ids in encoded], fill=0).bool()
    # Decoded texts, since a completion's text is what decoding appends to its prompt's.
    texts = tokenizer.batch_decode(encoded, skip_special_tokens=True)
    return PromptBatch(
        tokens=tokens.to(device),
        mask=mask.to(device),
        rows=tuple(_record(row, text) for row, text in zip(rows, texts, strict=True)),
    )


def _encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow], *, prepend_bos: bool | None
) -> list[list[int]]:
    if not rows:
        return []
    bos = leading_ids(tokenizer, prepend_bos=prepend_bos)
    texts = [
        row.prompt if isinstance(row.prompt, str) else render(tokenizer, row.prompt) for row in rows
    ]
    return [
        bos + ids if isinstance(row.prompt, str) else ids
        for row, ids in zip(rows, encode(tokenizer, texts), strict=True)
    ]


def render(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, what: str = "task"
) -> str:
    """A conversation as the text before the answer, including special tokens. Raises ConfigError
    that begins with `what` if the tokenizer has no chat template, or one that does not accept these
    messages."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{what}: the prompts are conversations, but the model's tokenizer has no chat"
            " template; choose a model that was trained on chats, or give prompts as text"
        )
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in conversation], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates are programs and may raise anything
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{what}: the tokenizer's chat template does not take {conversation!r:.200}: {reason}"
        ) from error


def _record(row: PromptRow, text: str) -> Mapping[str, Any]:
    # A column named messages would turn a text into a conversation that holds its answer.
    columns = {name: value for name, value in row.columns.items() if name != "messages"}
    conversation = {} if isinstance(row.prompt, str) else {"messages": row.prompt}
    return {**columns, **conversation, "prompt": text}


def take(prompts: PromptBatch, index: torch.Tensor) -> PromptBatch:
    """The rows at `index`, without columns that are padding in every row."""
    batch = prompts[index]
    width = int(batch.mask.sum(dim=1).max())
    return replace(batch, tokens=batch.tokens[:, -width:], mask=batch.mask[:, -width:])


class PromptStream(Iterator[PromptBatch]):
    """Endless batches: all prompts in random order, then all in another order; a batch may span the
    end of one and the beginning of the next."""

    def __init__(self, prompts: PromptBatch, batch_size: int, generator: torch.Generator) -> None:
        self._prompts, self._batch_size, self._generator = prompts, batch_size, generator
        self._pending = torch.empty(0, dtype=torch.long)

    def __next__(self) -> PromptBatch:
        while len(self._pending) < self._batch_size:
            order = torch.randperm(len(self._prompts.rows), generator=self._generator)
            self._pending = torch.cat([self._pending, order])
        chosen, self._pending = self._pending.split(
            [self._batch_size, len(self._pending) - self._batch_size]
        )
        return take(self._prompts, chosen)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The remaining indices of the current order, and the generator that draws the next."""
        return {"pending": self._pending, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continues from the state of another stream over the same prompts."""
        self._pending = state["pending"].clone()
        self._generator.set_state(state["generator"])

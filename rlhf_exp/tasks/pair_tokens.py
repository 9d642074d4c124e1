"""Preference pairs as tokens, and batches of their answers as Completions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.batches import pad_left, pad_right
from rlhf_exp.tasks.conversations import prompt_text
from rlhf_exp.tasks.encoding import can_encode, encode, leading_ids
from rlhf_exp.tasks.prompts import render
from rlhf_exp.tasks.protocol import Pair
from rlhf_exp.types import Completions, PromptBatch


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """A pair with the token ids of its prompt and answers, with EOS if the answer ended. For a
    classifier, each answer's ids are those of the whole text, and `prompt` is empty."""

    pair: Pair
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    sources: Sequence[str],
    *,
    prepend_bos: bool | None,
    limit: int,
) -> list[EncodedPair]:
    """The pairs as tokens; the only special tokens are BOS, if required, the answers' EOS, and
    those of the chat template, which renders conversations as for sampling.

    Raises ConfigError naming the source and the field of a text that the vocabulary cannot encode,
    of a conversation that the chat template does not accept, and of a prompt and answer that exceed
    `limit` tokens.
    """
    bos = leading_ids(tokenizer, prepend_bos=prepend_bos)
    texts = {name: [getattr(p, name) for p in pairs] for name in ("prompt", "chosen", "rejected")}
    texts["prompt"] = [
        p if isinstance(p, str) else render(tokenizer, p, what=f"task.path: {source}, field prompt")
        for p, source in zip(texts["prompt"], sources, strict=True)
    ]
    columns = {name: _encode(tokenizer, texts[name], name, sources) for name in texts}
    encoded = []
    for i, (pair, source) in enumerate(zip(pairs, sources, strict=True)):
        answers = {
            name: columns[name][i] + ([tokenizer.eos_token_id] if ended else [])
            for name, ended in (("chosen", pair.chosen_ended), ("rejected", pair.rejected_ended))
        }
        prompt = columns["prompt"][i]
        if isinstance(pair.prompt, str):
            _check_eos(tokenizer, prompt, "prompt", source)
            prompt = bos + prompt
        for name, answer in answers.items():
            _check_eos(tokenizer, columns[name][i], name, source)
            if not answer:
                raise ConfigError(f"task.path: {source}, field {name} is blank and has not ended")
            if len(prompt) + len(answer) > limit:
                raise ConfigError(
                    f"task.path: {source}, field {name} has {len(answer)} tokens after a prompt of"
                    f" {len(prompt)}, more than the model's context of {limit}: shorten it, or use"
                    " a model with a longer context"
                )
        encoded.append(EncodedPair(pair=pair, prompt=prompt, **answers))
    return encoded


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], field: str, sources: Sequence[str]
) -> list[list[int]]:
    try:
        rows = encode(tokenizer, texts)
    except ConfigError:
        for text, source in zip(texts, sources, strict=True):
            _check_words(tokenizer, text, field, source)
        raise
    unknown = tokenizer.unk_token_id
    for row, text, source in zip(rows, texts, sources, strict=True):
        # Byte-level tokenizers can encode everything, and their UNK is EOS.
        if unknown is not None and unknown != tokenizer.eos_token_id and unknown in row:
            _check_words(tokenizer, text, field, source)
            raise ConfigError(
                f"task.path: {source}, field {field} holds characters between its words that are"
                " not in the model's vocabulary: correct it, or use the model that wrote these"
                " answers"
            )
        if field == "prompt" and not row:
            raise ConfigError(f"task.path: {source}, field {field} has no tokens: {text!r}")
    return rows


def _check_eos(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], field: str, source: str
) -> None:
    """Raises ConfigError for an EOS that a text holds; a chat template may put one into a
    prompt."""
    if tokenizer.eos_token_id in ids:
        raise ConfigError(
            f"task.path: {source}, field {field} holds {tokenizer.eos_token!r}: remove it; EOS is"
            " appended to an answer unless chosen_ended or rejected_ended is false"
        )


def _check_words(tokenizer: PreTrainedTokenizerBase, text: str, field: str, source: str) -> None:
    """Raises ConfigError naming the first word of the text that is not in the vocabulary."""
    for word in text.split():
        in_vocab = can_encode(tokenizer, word)
        if in_vocab and tokenizer.unk_token_id is not None:
            in_vocab = tokenizer.unk_token_id not in encode(tokenizer, [word])[0]
        if not in_vocab:
            raise ConfigError(
                f"task.path: {source}, field {field} holds {word!r}, which is not in the model's"
                " vocabulary: correct it, or use the model that wrote these answers"
            )


def collate(
    pairs: Sequence[EncodedPair], *, width: int, device: torch.device | str = "cpu"
) -> Completions:
    """The chosen answers of all pairs, then the rejected answers in the same order, padded to
    `width` tokens."""
    return encode_completions(
        [pair.prompt for pair in pairs] * 2,
        [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs],
        texts=[pair.pair.chosen for pair in pairs] + [pair.pair.rejected for pair in pairs],
        prompt_texts=[prompt_text(pair.pair.prompt) for pair in pairs] * 2,
        width=width,
        device=device,
    )


def encode_completions(
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    *,
    prompt_texts: Sequence[str],
    texts: Sequence[str],
    width: int | None = None,
    device: torch.device | str = "cpu",
) -> Completions:
    """Completions of written prompts and answers, given as token ids; the answers are padded to
    `width` tokens or the longest."""

    def real(ids: Sequence[list[int]]) -> list[list[int]]:
        return [[1] * len(row) for row in ids]

    return Completions(
        prompts=PromptBatch(
            tokens=pad_left(prompts, fill=0).to(device),
            mask=pad_left(real(prompts), fill=0).bool().to(device),
            rows=tuple({"prompt": text} for text in prompt_texts),
        ),
        tokens=pad_right(answers, fill=0, width=width).to(device),
        mask=pad_right(real(answers), fill=0, width=width).bool().to(device),
        texts=tuple(texts),
    )

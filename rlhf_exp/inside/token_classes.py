"""The class of each token of a vocabulary: special, punctuation, function word and so on.

Knows English function words and how tokenizers mark the beginnings of words, not what the classes
are for.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlhf_exp.hf import PreTrainedTokenizerBase

CLASSES = (
    "special", "whitespace", "punctuation", "digits", "function word", "content word",
    "word part",
)  # fmt: skip
# Marks of a word's beginning: byte-level BPE, SentencePiece.
BEGINNINGS = ("\u0120", "\u2581")
CONTINUES = "##"  # WordPiece
MARKED = 0.05  # of the tokens of a vocabulary with such marks
ENGLISH = """
    a an the this that these those some any each every either neither no none all both such
    i you he she it we they me him her us them my your his its our their mine yours hers ours theirs
    myself yourself himself herself itself ourselves themselves who whom whose which what whoever
    and or but nor so yet if because although though while whereas since unless until than whether
    as of in on at by for with from to into onto upon about above below under over between among
    through during before after against without within along across behind beyond near off out up
    down around toward towards per via am is are was were be been being do does did done doing have
    has had having can could will would shall should may might must ought not n't 's 're 've 'll 'd
    'm there here then when where why how too very just also only even again once more most less
    least much many few other another own same
"""
FUNCTION_WORDS = frozenset(ENGLISH.split())


class TokenClasses(NamedTuple):
    """For each token of a vocabulary: the index in CLASSES, and whether it begins a word. A token
    without letters begins none."""

    classes: Int[Tensor, " vocab"]
    begins_word: Bool[Tensor, " vocab"]


def token_classes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TokenClasses:
    """The classes of a vocabulary's tokens, each looked at by itself: a word of several tokens is a
    content word at its first token, and word parts follow. A capital letter begins a word even
    without the tokenizer's mark, as at the beginning of a text. Rows of the embedding beyond the
    tokenizer's tokens are special."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocab_size))))
    is_special = set(tokenizer.all_special_ids)
    marked = _is_marked([piece or "" for piece in pieces])
    names, beginnings = [], []
    for token, piece in enumerate(pieces):
        text = tokenizer.decode([token]) if piece is not None else ""
        begins = _begins(piece or "", marked) or text[:1].isupper()
        name = "special" if token in is_special else _name(text.strip(), begins=begins)
        names.append(name)
        beginnings.append(begins and name in ("function word", "content word"))
    missing = vocab_size - len(pieces)
    return TokenClasses(
        classes=torch.tensor([CLASSES.index(name) for name in (*names, *["special"] * missing)]),
        begins_word=torch.tensor([*beginnings, *[False] * missing]),
    )


def _is_marked(pieces: list[str]) -> bool | None:
    """Whether beginnings of words are marked; None if their continuations are."""
    if sum(piece.startswith(BEGINNINGS) for piece in pieces) > MARKED * len(pieces):
        return True
    continued = sum(piece.startswith(CONTINUES) for piece in pieces)
    return None if continued > MARKED * len(pieces) else False


def _begins(piece: str, marked: bool | None) -> bool:
    if marked is None:
        return not piece.startswith(CONTINUES)
    return not marked or piece.startswith(BEGINNINGS)


def _name(text: str, *, begins: bool) -> str:
    if not text:
        return "whitespace"
    if any(letter.isalpha() for letter in text):
        if text.lower() in FUNCTION_WORDS and (begins or text.startswith("'")):
            return "function word"
        return "content word" if begins else "word part"
    return "digits" if any(letter.isdigit() for letter in text) else "punctuation"

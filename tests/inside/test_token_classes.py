"""Classes of tokens in the vocabularies of each kind of tokenizer."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_exp.inside.token_classes import CLASSES, token_classes
from rlhf_exp.tasks.tokenizers import word_tokenizer

EXPECTED = {
    "<eos>": "special", "+the": "function word", "+The": "function word", "The": "function word",
    "+river": "content word", "ing": "word part", "the": "word part", "'s": "function word",
    ".": "punctuation", "+(": "punctuation", "42": "digits", "+1": "digits", "+": "whitespace",
}  # fmt: skip


def marked_tokenizer(mark: str) -> PreTrainedTokenizerBase:
    vocab = {name.replace("+", mark): i for i, name in enumerate(EXPECTED)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    tokenizer.decoder = decoders.ByteLevel() if mark == "\u0120" else decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("mark", ["\u0120", "\u2581"])
def test_marks_begin_words(mark: str) -> None:
    found = token_classes(marked_tokenizer(mark), len(EXPECTED) + 2)
    names = [CLASSES[i] for i in found.classes]
    assert dict(zip(EXPECTED, names, strict=False)) == EXPECTED
    assert names[-2:] == ["special", "special"]  # rows without a token
    begins = dict(zip(EXPECTED, found.begins_word.tolist(), strict=False))
    assert [name for name, begin in begins.items() if begin] == ["+the", "+The", "The", "+river"]


def test_every_token_of_a_word_tokenizer_is_a_word() -> None:
    found = token_classes(word_tokenizer(["the", "film", "7", "!"]), 8)
    names = [CLASSES[i] for i in found.classes]
    assert names[:4] == ["special"] * 4
    assert names[4:] == ["function word", "content word", "digits", "punctuation"]
    assert found.begins_word.tolist() == [False] * 4 + [True, True, False, False]


def test_word_pieces_mark_what_continues() -> None:
    vocab = {name: i for i, name in enumerate(["[UNK]", "of", "river", "##bank", "##s"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    names = [CLASSES[i] for i in token_classes(fast, 5).classes]
    assert names == ["special", "function word", "content word", "word part", "word part"]

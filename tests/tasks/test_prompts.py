"""Prompts: padded on the left, cut of common padding, streamed without end."""

from itertools import islice

import pytest
import torch

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.prompts import encode_prompts, prompt_stream, take
from rlhf_exp.tasks.tokenizers import word_tokenizer

TOKENIZER = word_tokenizer(["a", "b", "c"])  # ids 4, 5, 6; <bos> is 1


def test_prompts_are_padded_on_the_left_with_zeros() -> None:
    batch = encode_prompts(TOKENIZER, ["a b c", "b"], prepend_bos=True)
    assert batch.tokens.tolist() == [[1, 4, 5, 6], [0, 0, 1, 5]]
    assert batch.mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert batch.texts == ("a b c", "b")
    bare = encode_prompts(TOKENIZER, ["a b c", "b"], prepend_bos=False)
    assert bare.tokens.tolist() == [[4, 5, 6], [0, 0, 5]]


def test_taking_rows_drops_columns_that_are_padding_in_all_of_them() -> None:
    batch = encode_prompts(TOKENIZER, ["a b c", "b", "c a"], prepend_bos=False)
    part = take(batch, torch.tensor([2, 1]))
    assert part.tokens.tolist() == [[6, 4], [0, 5]]
    assert part.mask.tolist() == [[True, True], [False, True]]
    assert part.texts == ("c a", "b")


def test_the_stream_gives_every_prompt_once_before_any_comes_again() -> None:
    prompts = encode_prompts(TOKENIZER, ["a", "b", "c", "a b", "b c"], prepend_bos=False)
    stream = prompt_stream(prompts, 3, torch.Generator().manual_seed(0))
    texts = [text for batch in islice(stream, 10) for text in batch.texts]
    assert len(texts) == 30
    for start in range(0, 30, 5):
        assert sorted(texts[start : start + 5]) == ["a", "a b", "b", "b c", "c"]
    assert texts[:5] != texts[5:10]
    one = prompt_stream(encode_prompts(TOKENIZER, ["a"], prepend_bos=False), 4, torch.Generator())
    assert next(one).texts == ("a",) * 4


def test_what_cannot_be_a_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="a prompt has no tokens"):
        encode_prompts(TOKENIZER, ["a", ""], prepend_bos=False)
    assert encode_prompts(TOKENIZER, [""], prepend_bos=True).tokens.tolist() == [[1]]
    without = word_tokenizer(["a"])
    without.bos_token = None
    with pytest.raises(ConfigError, match=r"task\.prepend_bos=true, but the tokenizer has no BOS"):
        encode_prompts(without, ["a"], prepend_bos=True)

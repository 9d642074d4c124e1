import pytest

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.encoding import can_encode, encode, leading_ids, tokenizer_factory
from rlhf_exp.tasks.prefix import Prefix
from rlhf_exp.tasks.tokenizers import closed_word_tokenizer, word_tokenizer
from tests.stages.toy import ToyTask

CLOSED = closed_word_tokenizer(["a", "b"], pad="<p>", eos="<e>")


def test_texts_become_ids_without_special_tokens():
    assert encode(CLOSED, ["a b", "b", ""]) == [[2, 3], [3], []]


def test_a_text_that_a_closed_vocabulary_refuses_is_named():
    with pytest.raises(ConfigError, match=r"does not hold every word of 'b c'"):
        encode(CLOSED, ["a b", "b c", "d"])
    assert [can_encode(CLOSED, text) for text in ("a b", "b c", "")] == [True, False, True]
    assert can_encode(word_tokenizer(["a"]), "b")


def test_another_mistake_is_not_taken_for_an_unknown_word():
    with pytest.raises(Exception, match=r".") as caught:
        encode(CLOSED, [1])
    assert not isinstance(caught.value, ConfigError)


def test_a_prompt_begins_with_bos_or_nothing():
    tokenizer = word_tokenizer(["a"])
    assert leading_ids(tokenizer, prepend_bos=True) == [tokenizer.bos_token_id]
    assert leading_ids(tokenizer, prepend_bos=False) == leading_ids(CLOSED, prepend_bos=False) == []
    with pytest.raises(ConfigError, match=r"^task\.prepend_bos=true, but the tokenizer has no BOS"):
        leading_ids(CLOSED, prepend_bos=True)


def test_only_a_task_with_texts_makes_a_tokenizer():
    task = ToyTask()
    assert tokenizer_factory(task)().get_vocab() == task.build_tokenizer().get_vocab()
    assert tokenizer_factory(Prefix()) is None

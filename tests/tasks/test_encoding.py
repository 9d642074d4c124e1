import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.encoding import can_encode, encode, leading_ids, tokenizer_factory
from rlhf_exp.tasks.prefix import Prefix
from rlhf_exp.tasks.tokenizers import closed_word_tokenizer, word_tokenizer
from tests.rl.toy import ToyTask

CLOSED = closed_word_tokenizer(["a", "b"], pad="<p>", eos="<e>")


def templated(template: str, *words: str, unk: str | None = "<u>", **special: str):
    """A word tokenizer that puts special tokens round texts by itself, as `template` says."""
    names = dict.fromkeys(
        (*special.values(), *(t for t in template.split() if t != "$A"), *([unk] if unk else []))
    )
    vocab = {token: i for i, token in enumerate((*names, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(token, vocab[token]) for token in template.split() if token != "$A"],
    )
    unknown = {"unk_token": unk} if unk else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **unknown)


def test_texts_become_ids_without_special_tokens():
    assert encode(CLOSED, ["a b", "b", ""]) == [[2, 3], [3], []]
    tokenizer = templated("<b> $A <e>", "x", "y", bos_token="<b>", eos_token="<e>")
    assert tokenizer("x y")["input_ids"] == [0, 3, 4, 1]
    assert encode(tokenizer, ["x y", "<b> y"]) == [[3, 4], [0, 4]]


def test_a_text_that_a_closed_vocabulary_refuses_is_named():
    with pytest.raises(ConfigError, match=r"does not hold every word of 'b c': use the task that"):
        encode(CLOSED, ["a b", "b c", "d"])
    with pytest.raises(ConfigError, match=rf"every word of '{'c' * 60}': use"):
        encode(CLOSED, ["c" * 1000])
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


BOTH = {"bos_token": "<b>", "eos_token": "<e>"}
SAME = {"bos_token": "<b>", "eos_token": "<b>"}


@pytest.mark.parametrize(
    ("template", "special", "leading"),
    [
        ("$A", BOTH, []),
        ("<b> $A", BOTH, ["<b>"]),
        ("<b> $A <e>", BOTH, ["<b>"]),
        ("$A <e>", BOTH, []),
        ("$A <b>", SAME, []),
        ("<b> $A", SAME, ["<b>"]),
        ("<b> $A <b>", SAME, ["<b>"]),
        ("<c> $A <s>", {"cls_token": "<c>", "sep_token": "<s>"}, ["<c>"]),
        ("<g> <s> $A", {"eos_token": "<e>"}, ["<g>", "<s>"]),
        ("<b> <b> $A", BOTH, ["<b>", "<b>"]),
    ],
)
# The probe is known, unknown, unknown and the same token as BOS, or left out.
@pytest.mark.parametrize(
    ("words", "unk"),
    [(["a"], "<u>"), (["x"], "<u>"), (["x", "y"], "<b>"), (["x"], None)],
)
def test_what_the_tokenizer_puts_in_front_by_itself_begins_a_prompt(
    template, special, leading, words, unk
):
    tokenizer = templated(template, *words, unk=unk, **special)
    expected = tokenizer.convert_tokens_to_ids(leading)
    assert leading_ids(tokenizer, prepend_bos=None) == expected
    # As the tokenizer begins a text whose words it knows.
    ids = tokenizer(f"{words[0]} {words[0]}")["input_ids"]
    assert ids[: len(expected) + 1] == [*expected, tokenizer.convert_tokens_to_ids(words[0])]


def test_a_text_of_which_the_tokenizer_leaves_nothing_does_not_tell_what_is_in_front():
    tokenizer = Tokenizer(models.BPE({"<b>": 0, "x": 1}, []))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<b> $A", special_tokens=[("<b>", 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<b>")
    assert [wrapped(text)["input_ids"] for text in ("a", "x")] == [[0], [0, 1]]
    assert leading_ids(wrapped, prepend_bos=None) == [0]


def test_what_the_tokenizer_does_by_itself_can_be_overruled():
    tokenizer = templated("<b> $A", "a", **BOTH)
    assert leading_ids(tokenizer, prepend_bos=False) == []
    assert leading_ids(templated("$A", "a", **BOTH), prepend_bos=True) == [0]


def test_our_own_tokenizers_put_nothing_in_front():
    assert leading_ids(CLOSED, prepend_bos=None) == []
    assert leading_ids(word_tokenizer(["b"]), prepend_bos=None) == []
    assert leading_ids(closed_word_tokenizer([], pad="<p>", eos="<e>"), prepend_bos=None) == []


def test_only_a_task_with_texts_makes_a_tokenizer():
    task = ToyTask()
    assert tokenizer_factory(task)().get_vocab() == task.build_tokenizer().get_vocab()
    assert tokenizer_factory(Prefix()) is None

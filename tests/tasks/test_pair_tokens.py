"""Pairs as tokens: EOS where an answer ended, every error by source and field, and the layout of
samples."""

import pytest
import torch

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.pair_tokens import collate, encode_pairs
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.tasks.protocol import Pair, PromptRow
from rlhf_exp.tasks.tokenizers import byte_pair_tokenizer, closed_word_tokenizer, word_tokenizer

OPEN = word_tokenizer(["a", "b", "c"])  # ids 4, 5, 6; <bos> is 1, <eos> is 2, <unk> is 3
CLOSED = closed_word_tokenizer(["a", "b", "c"], pad="<PAD>", eos="<EOS>")  # 2, 3, 4; <EOS> is 1
PAIRS = [
    Pair("a b c", " a", " b b"),
    Pair("c", " a a a", " c", chosen_ended=False),
    Pair("b b", " c a", " a c", 2.0, 1.0, rejected_ended=False),
]
SOURCES = ["f.jsonl, row 1", "f.jsonl, row 3", "g.jsonl, row 1"]

both = pytest.mark.parametrize("tokenizer", [OPEN, CLOSED], ids=["unk", "closed"])


def encode(pairs=PAIRS, tokenizer=CLOSED, *, prepend_bos=False, limit=6):
    return encode_pairs(
        tokenizer, pairs, SOURCES[: len(pairs)], prepend_bos=prepend_bos, limit=limit
    )


def test_answers_that_ended_have_eos_and_the_others_have_none():
    encoded = encode()
    assert [pair.pair for pair in encoded] == PAIRS
    assert [pair.prompt for pair in encoded] == [[2, 3, 4], [4], [3, 3]]
    assert [pair.chosen for pair in encoded] == [[2, 1], [2, 2, 2], [4, 2, 1]]
    assert [pair.rejected for pair in encoded] == [[3, 3, 1], [4, 1], [2, 4]]


def test_prompts_begin_with_bos_if_that_is_asked_for():
    for prepend_bos, before in ((True, [1]), (False, [])):
        encoded = encode(tokenizer=OPEN, prepend_bos=prepend_bos, limit=7)
        prompts = [pair.prompt for pair in encoded]
        assert prompts == [[*before, 4, 5, 6], [*before, 6], [*before, 5, 5]]
        assert encoded[0].chosen == [4, 2]


def test_bos_of_a_tokenizer_without_one_is_refused():
    with pytest.raises(ConfigError, match=r"^task\.prepend_bos=true, but the tokenizer has no BOS"):
        encode(prepend_bos=True)


@both
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_word_outside_the_vocabulary_is_named_with_source_and_field(tokenizer, field):
    pairs = [PAIRS[0], PAIRS[1]._replace(**{field: " a zebra yak"}), PAIRS[2]]
    expected = rf"^task\.path: f\.jsonl, row 3, field {field} holds 'zebra', which is not in the"
    with pytest.raises(ConfigError, match=expected):
        encode(pairs, tokenizer)


def test_letters_that_byte_pairs_do_not_know_are_named():
    tokenizer = byte_pair_tokenizer(["a b c", "c b a"], vocab_size=20)
    with pytest.raises(ConfigError, match=r"f\.jsonl, row 1, field chosen holds 'az', which is no"):
        encode([Pair("a", " b az", " c")], tokenizer)


def test_unk_that_is_eos_stands_for_nothing_unknown():
    tokenizer = word_tokenizer(["a", "b", "c"])
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2 has it
    with pytest.raises(ConfigError, match=r"field chosen holds '<eos>': remove it"):
        encode([Pair("a", " b <eos>", " c")], tokenizer)


def test_white_space_that_byte_pairs_do_not_know_is_refused():
    tokenizer = byte_pair_tokenizer(["a b c", "c b a"], vocab_size=20)
    with pytest.raises(ConfigError, match=r"field rejected holds characters between its words"):
        encode([Pair("a", " b", " a\nc")], tokenizer)


@both
def test_a_written_end_of_sequence_is_refused(tokenizer):
    eos = tokenizer.eos_token
    expected = rf"f\.jsonl, row 1, field rejected holds '{eos}': remove it"
    with pytest.raises(ConfigError, match=expected):
        encode([Pair("a", " b", f" c {eos}")], tokenizer)


@both
def test_a_prompt_of_no_tokens_is_refused(tokenizer):
    pairs = [PAIRS[0], PAIRS[1]._replace(prompt=" \n")]
    expected = r"^task\.path: f\.jsonl, row 3, field prompt has no tokens: ' \\n'$"
    with pytest.raises(ConfigError, match=expected):
        encode(pairs, tokenizer)


@both
def test_an_answer_may_be_blank_if_it_ended(tokenizer):
    [pair] = encode([Pair("a", " b", "")], tokenizer)
    assert pair.rejected == [tokenizer.eos_token_id]
    expected = r"^task\.path: f\.jsonl, row 1, field rejected is blank and has not ended$"
    with pytest.raises(ConfigError, match=expected):
        encode([Pair("a", " b", "", rejected_ended=False)], tokenizer)


def test_what_exceeds_the_context_is_refused_with_its_lengths():
    encode(limit=6)  # three tokens of the first prompt, three of its rejected answer
    expected = (
        r"^task\.path: f\.jsonl, row 1, field rejected has 3 tokens after a prompt of 3, more than"
        r" the model's context of 5: "
    )
    with pytest.raises(ConfigError, match=expected):
        encode(limit=5)
    with pytest.raises(ConfigError, match=r"field chosen has 2 tokens after a prompt of 3, .* 4:"):
        encode(limit=4)
    # BOS counts.
    with pytest.raises(
        ConfigError, match=r"row 1, field rejected has 3 tokens after a prompt of 4"
    ):
        encode(tokenizer=OPEN, prepend_bos=True, limit=6)


def test_chosen_answers_come_first_and_padding_is_outside():
    batch = collate(encode(), width=4)
    prompts = [[2, 3, 4], [0, 0, 4], [0, 3, 3]]
    assert batch.prompts.tokens.tolist() == prompts * 2
    masks = [[True, True, True], [False, False, True], [False, True, True]]
    assert batch.prompts.mask.tolist() == masks * 2
    assert batch.tokens.tolist() == [
        [2, 1, 0, 0],
        [2, 2, 2, 0],
        [4, 2, 1, 0],
        [3, 3, 1, 0],
        [4, 1, 0, 0],
        [2, 4, 0, 0],
    ]
    lengths = [2, 3, 3, 3, 2, 2]
    assert batch.mask.tolist() == [[i < length for i in range(4)] for length in lengths]
    assert batch.mask.dtype == batch.prompts.mask.dtype == torch.bool
    assert batch.texts == (" a", " a a a", " c a", " b b", " c", " a c")
    assert batch.prompts.texts == ("a b c", "c", "b b") * 2
    assert batch.full_texts[3] == "a b c b b"


def test_a_token_of_id_zero_is_no_padding():
    # <PAD> is 0 here, and a vocabulary may as well begin with a word.
    tokenizer = closed_word_tokenizer(["b"], pad="a", eos="<EOS>")
    batch = collate(encode([Pair("a b a", " a a", " b")], tokenizer), width=3)
    assert batch.prompts.mask.all()
    assert batch.tokens.tolist() == [[0, 0, 1], [2, 1, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]


# A turn ends with <eos>, as with <|im_end|>.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} a {{ m.content }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %} b{% endif %}"
)
CHAT = [{"role": "user", "content": "c c"}]


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    tokenizer = word_tokenizer(["a", "b", "c"])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("prepend_bos", [False, True, None])
def test_a_conversation_has_the_tokens_of_its_prompt_in_ppo(prepend_bos):
    tokenizer = chat_tokenizer()
    [pair] = encode(
        [Pair(CHAT, "a", "c b", rejected_ended=False)], tokenizer, prepend_bos=prepend_bos, limit=8
    )
    # The template decides about <bos>, and may hold <eos>; an answer ends with it.
    assert pair.prompt == [1, 4, 6, 6, 2, 5]
    assert (pair.chosen, pair.rejected) == ([4, 2], [6, 5])
    row = PromptRow(CHAT, {})
    assert [pair.prompt] == encode_prompts(tokenizer, [row], prepend_bos=None).tokens.tolist()
    by_hand = "<bos> a c c <eos> b"
    assert tokenizer(by_hand, add_special_tokens=False)["input_ids"] == pair.prompt
    assert collate([pair], width=2).prompts.texts == ("user: c c",) * 2


def test_texts_and_conversations_may_be_mixed():
    encoded = encode(
        [Pair("c", " a", " b"), Pair(CHAT, "a", "b")], chat_tokenizer(), prepend_bos=True, limit=8
    )
    assert [pair.prompt for pair in encoded] == [[1, 6], [1, 4, 6, 6, 2, 5]]


def test_a_conversation_that_cannot_be_rendered_is_named():
    pairs = [PAIRS[0], Pair(CHAT, "a", "b")]
    with pytest.raises(
        ConfigError, match=r"^task\.path: f\.jsonl, row 3, field prompt: .* has no c"
    ):
        encode(pairs, chat_tokenizer(None))
    refusing = chat_tokenizer("{{ raise_exception('no system message') }}")
    expected = r"^task\.path: f\.jsonl, row 3, field prompt: the tokenizer's chat .*: no system mes"
    with pytest.raises(ConfigError, match=expected):
        encode(pairs, refusing)


def test_an_answer_may_not_hold_what_ends_a_turn():
    with pytest.raises(ConfigError, match=r"row 1, field chosen holds '<eos>': remove it"):
        encode([Pair(CHAT, "a <eos>", "b")], chat_tokenizer())

import pytest
from transformers import AutoTokenizer

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.tokenizers import byte_pair_tokenizer, closed_word_tokenizer, word_tokenizer

TEXTS = [
    "the plot's twists -- all of them -- are \"clever\" ; it isn't long .",
    "a warm , witty film from start to finish ( and after ) .",
    "50% of it works ; the rest is so-so & dull !",
] * 3
WORDS = sorted({word for text in TEXTS for word in text.split()})

tokenizers = pytest.mark.parametrize(
    "build",
    [lambda: word_tokenizer(WORDS), lambda: byte_pair_tokenizer(TEXTS, vocab_size=120)],
    ids=["words", "byte pairs"],
)


@tokenizers
def test_decoding_undoes_encoding(build):
    tokenizer = build()
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


@tokenizers
def test_special_tokens_are_four_distinct_ones_and_padding_is_on_the_left(build):
    tokenizer = build()
    ids = [
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    ]
    assert ids == [0, 1, 2, 3]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    short, long = (len(tokenizer(text)["input_ids"]) for text in ("the", TEXTS[0]))
    batch = tokenizer(["the", TEXTS[0]], padding=True)
    assert batch["attention_mask"] == [[0] * (long - short) + [1] * short, [1] * long]
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id
    ids = [1, *tokenizer(TEXTS[0])["input_ids"], 2, 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXTS[0]


@tokenizers
def test_a_saved_tokenizer_is_the_same_one_when_loaded(build, tmp_path):
    tokenizer = build()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    texts = [*TEXTS, "an unseen café Word"]
    assert loaded(texts, padding=True) == tokenizer(texts, padding=True)
    ids = tokenizer(texts)["input_ids"]
    assert loaded.batch_decode(ids) == tokenizer.batch_decode(ids)


@tokenizers
def test_building_again_gives_the_same_tokenizer(build):
    assert build().get_vocab() == build().get_vocab()


def test_a_word_is_one_token_once_and_other_words_are_unknown():
    tokenizer = word_tokenizer(["b", "a", "b", "<eos>"])
    assert len(tokenizer) == 6
    assert tokenizer("a b a zebra <eos>")["input_ids"] == [5, 4, 5, 3, 2]


def test_byte_pairs_strip_accents_and_know_no_letters_but_those_of_the_texts():
    tokenizer = byte_pair_tokenizer(["a café in the café"], vocab_size=100)
    assert tokenizer.decode(tokenizer("a café")["input_ids"]) == "a cafe"
    assert tokenizer("z")["input_ids"] == [tokenizer.unk_token_id]
    assert "Ġcafe" in tokenizer.get_vocab()


def test_byte_pairs_keep_to_the_vocabulary_size_or_refuse_it():
    assert len(byte_pair_tokenizer(TEXTS, vocab_size=80)) == 80
    alphabet = len(set("".join(TEXTS)))  # ASCII: a byte is a letter
    assert len(byte_pair_tokenizer(TEXTS, vocab_size=alphabet + 4)) == alphabet + 4
    with pytest.raises(
        ConfigError, match=rf"task\.vocab_size={alphabet + 3} .* at least {alphabet + 4}"
    ):
        byte_pair_tokenizer(TEXTS, vocab_size=alphabet + 3)


def closed():
    return closed_word_tokenizer(["<SEP>", "b", "a", "b", "12"], pad="<PAD>", eos="<EOS>")


def test_a_closed_vocabulary_is_padding_eos_and_the_words_once_each():
    tokenizer = closed()
    assert tokenizer.get_vocab() == {"<PAD>": 0, "<EOS>": 1, "<SEP>": 2, "b": 3, "a": 4, "12": 5}
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (tokenizer.bos_token_id, tokenizer.unk_token_id) == (None, None)
    assert tokenizer("a  b 12 <SEP>\n<EOS>")["input_ids"] == [4, 3, 5, 2, 1]
    assert tokenizer(["a b", "b"], padding=True)["input_ids"] == [[4, 3], [0, 3]]
    assert tokenizer.decode([4, 3, 2, 5, 1, 0], skip_special_tokens=True) == "a b <SEP> 12"


@pytest.mark.parametrize("text", ["a c", "ab", "1", "a.", "A", "<UNK>"])
def test_a_closed_vocabulary_refuses_any_other_word(text):
    with pytest.raises(Exception, match="WordLevel error: Missing \\[UNK\\] token"):
        closed()(text)
    with pytest.raises(Exception, match="WordLevel error: Missing \\[UNK\\] token"):
        closed()(["a", text])


def test_a_closed_vocabulary_is_the_same_one_when_loaded(tmp_path):
    tokenizer = closed()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert (loaded.bos_token_id, loaded.unk_token_id) == (None, None)
    texts = ["a b 12", "b <SEP>", "<EOS>"]
    assert loaded(texts, padding=True) == tokenizer(texts, padding=True)
    ids = tokenizer(texts)["input_ids"]
    assert loaded.batch_decode(ids) == tokenizer.batch_decode(ids)
    with pytest.raises(Exception, match="WordLevel error: Missing \\[UNK\\] token"):
        loaded("a c")

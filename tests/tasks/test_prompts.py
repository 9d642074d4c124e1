"""Prompts: padded on the left, rendered, shaped, cut of common padding, streamed without end."""

from collections.abc import Sequence
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.prompts import PromptStream, encode_prompts, render, take
from rlhf_exp.tasks.protocol import PromptRow
from rlhf_exp.tasks.tokenizers import byte_pair_tokenizer, word_tokenizer

TOKENIZER = word_tokenizer(["a", "b", "c"])  # ids 4, 5, 6; <bos> is 1
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }} <end>{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Puts <b> before and <e> behind texts by itself: <b> <e> <u> <user> <assistant> <end> are 0
    to 5, a b c 6 to 8."""
    names = ["<b>", "<e>", "<u>", "<user>", "<assistant>", "<end>", "a", "b", "c"]
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<b> $A <e>", special_tokens=[("<b>", 0), ("<e>", 1)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<b>",
        eos_token="<e>",
        unk_token="<u>",
        additional_special_tokens=[AddedToken(n, special=True) for n in names[3:6]],
    )
    wrapped.chat_template = template
    return wrapped


class Shaping:
    """Keeps the last tokens, and prompts of so many columns."""

    def __init__(self, *, columns: int = 0, tokens: int = 2) -> None:
        self.columns, self.tokens, self.seen = columns, tokens, []

    def shape_prompt(self, row: PromptRow, ids: Sequence[int]) -> Sequence[int] | None:
        self.seen.append((row, list(ids)))
        return tuple(ids[-self.tokens :]) if len(row.columns) >= self.columns else None


# Texts


def test_prompts_are_padded_on_the_left_with_zeros() -> None:
    batch = encode_prompts(TOKENIZER, ["a b c", "b"], prepend_bos=True)
    assert batch.tokens.tolist() == [[1, 4, 5, 6], [0, 0, 1, 5]]
    assert batch.mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert batch.texts == ("a b c", "b")
    assert batch.rows == ({"prompt": "a b c"}, {"prompt": "b"})
    bare = encode_prompts(TOKENIZER, ["a b c", "b"], prepend_bos=False)
    assert bare.tokens.tolist() == [[4, 5, 6], [0, 0, 5]]
    assert bare.tokens.dtype == torch.long


def test_a_text_begins_as_the_tokenizer_begins_it_or_as_it_is_told() -> None:
    given = {
        choice: encode_prompts(chat_tokenizer(), ["a"], prepend_bos=choice).tokens.tolist()
        for choice in (None, True, False)
    }
    assert given == {None: [[0, 6]], True: [[0, 6]], False: [[6]]}
    assert encode_prompts(TOKENIZER, ["a"], prepend_bos=None).tokens.tolist() == [[4]]


def test_the_text_of_a_prompt_is_what_decoding_its_tokens_gives() -> None:
    batch = encode_prompts(chat_tokenizer(), ["a  <b>\tb"], prepend_bos=True)
    assert batch.tokens.tolist() == [[0, 6, 0, 7]]
    assert batch.texts == ("a b",)
    # Where accents are stripped.
    tokenizer = byte_pair_tokenizer(["cafe au lait"], vocab_size=40)
    assert encode_prompts(tokenizer, ["café au"], prepend_bos=False).texts == ("cafe au",)


def test_padding_is_no_part_of_the_text_though_its_number_is_a_words() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    )
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    batch = encode_prompts(tokenizer, ["a b a", "a"], prepend_bos=None)
    assert batch.tokens.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert batch.mask.sum(dim=1).tolist() == [3, 1]
    assert batch.texts == ("a b a", "a")


def test_columns_stand_beside_the_text() -> None:
    prompts = [PromptRow("a", {"n": 1, "prompt": "x", "answer": "y"}), "b", PromptRow("c", {})]
    batch = encode_prompts(TOKENIZER, prompts, prepend_bos=False)
    assert batch.rows == ({"n": 1, "prompt": "a", "answer": "y"}, {"prompt": "b"}, {"prompt": "c"})


def test_a_column_of_messages_does_not_make_a_conversation_of_a_text() -> None:
    row = PromptRow("a", {"messages": [user("a"), assistant("b")], "n": 1})
    batch = encode_prompts(TOKENIZER, [row], prepend_bos=False)
    assert batch.rows == ({"n": 1, "prompt": "a"},)
    conversation = PromptRow([user("c")], row.columns)
    batch = encode_prompts(chat_tokenizer(), [conversation], prepend_bos=None)
    assert batch.rows == ({"n": 1, "messages": [user("c")], "prompt": "c"},)


def test_what_cannot_be_a_prompt_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        encode_prompts(TOKENIZER, ["a", ""], prepend_bos=False)
    assert str(caught.value) == (
        "task: the prompt '' has no tokens; give it text, or BOS with task.prepend_bos=true"
    )
    assert encode_prompts(TOKENIZER, [""], prepend_bos=True).tokens.tolist() == [[1]]
    without = word_tokenizer(["a"])
    without.bos_token = None
    with pytest.raises(ConfigError, match=r"task\.prepend_bos=true, but the tokenizer has no BOS"):
        encode_prompts(without, ["a"], prepend_bos=True)
    with pytest.raises(ConfigError, match=r"^task: none of 0 prompts is left$"):
        encode_prompts(TOKENIZER, [], prepend_bos=True)


# Conversations


def test_a_conversation_is_rendered_up_to_where_the_answer_begins() -> None:
    tokenizer = chat_tokenizer()
    conversation = [user("a"), assistant("b"), user("c")]
    assert render(tokenizer, conversation) == (
        "<b> <user> a <end> <assistant> b <end> <user> c <end> <assistant>"
    )
    rows = [PromptRow(conversation, {"n": 1}), PromptRow([user("c")], {"n": 2})]
    for prepend_bos in (None, True, False):  # of texts; the template begins as it begins
        batch = encode_prompts(tokenizer, rows, prepend_bos=prepend_bos)
        assert batch.tokens.tolist() == [
            [0, 3, 6, 5, 4, 7, 5, 3, 8, 5, 4],
            [0] * 6 + [0, 3, 8, 5, 4],
        ]
        assert batch.mask.sum(dim=1).tolist() == [11, 5]
        assert batch.rows == (
            {"n": 1, "messages": conversation, "prompt": "a b c"},
            {"n": 2, "messages": [user("c")], "prompt": "c"},
        )


def test_texts_and_conversations_go_into_one_batch() -> None:
    prompts = ["a", PromptRow([user("b")], {}), PromptRow("c", {"n": 1})]
    batch = encode_prompts(chat_tokenizer(), prompts, prepend_bos=None)
    ids = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)]
    assert ids == [[0, 6], [0, 3, 7, 5, 4], [0, 8]]
    assert ["messages" in row for row in batch.rows] == [False, True, False]


def test_a_tokenizer_without_a_chat_template_takes_no_conversations() -> None:
    with pytest.raises(ConfigError) as caught:
        encode_prompts(TOKENIZER, [PromptRow([user("a")], {})], prepend_bos=None)
    assert str(caught.value) == (
        "task: the prompts are conversations, but the model's tokenizer has no chat template;"
        " choose a model that was trained on chats, or give prompts as text"
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Only the user may speak') }}", "Only the user may speak"),
        ("{{ messages[0].content.none() }}", "no attribute 'none'"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('two\\nlines ' + 'x' * 999) }}", "two lines xxx"),
    ],
)
def test_messages_that_the_template_does_not_take_are_shown(template: str, reason: str) -> None:
    conversation = [user("a"), assistant("b" * 500), user("c")]
    with pytest.raises(ConfigError, match=reason) as caught:
        encode_prompts(chat_tokenizer(template), [PromptRow(conversation, {})], prepend_bos=None)
    text = str(caught.value)
    assert text.startswith(
        "task: the tokenizer's chat template does not take [{'role': 'user', 'content': 'a'}, "
    )
    assert len(text) < 500
    assert "\n" not in text


def test_a_conversation_that_renders_to_nothing_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^task: the prompt \[{'content': 'a', 'role': 'user'}\]"
    ):
        encode_prompts(chat_tokenizer(" "), [PromptRow([user("a")], {})], prepend_bos=None)


# Shaping


def test_a_task_chooses_and_cuts_prompts_by_their_tokens() -> None:
    shaping = Shaping(columns=1)
    prompts = ["a", PromptRow("a b c", {"n": 1}), PromptRow([user("b")], {"n": 2})]
    batch = encode_prompts(chat_tokenizer(), prompts, prepend_bos=True, shaping=shaping)
    assert shaping.seen == [
        (PromptRow("a", {}), [0, 6]),
        (prompts[1], [0, 6, 7, 8]),
        (prompts[2], [0, 3, 7, 5, 4]),
    ]
    assert batch.tokens.tolist() == [[7, 8], [5, 4]]
    assert batch.rows == (
        {"n": 1, "prompt": "b c"},
        {"n": 2, "messages": [user("b")], "prompt": ""},
    )


def test_prompts_of_which_none_is_left_are_refused_with_their_lengths() -> None:
    with pytest.raises(ConfigError) as caught:
        encode_prompts(TOKENIZER, ["a b", "a b c"], prepend_bos=True, shaping=Shaping(columns=1))
    assert str(caught.value) == (
        "task: none of 2 prompts is left: they have 3 to 4 tokens; widen task.min_tokens and"
        " task.max_tokens"
    )


def test_a_prompt_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^task: the prompt 'a b' has no tokens"):
        encode_prompts(TOKENIZER, ["a b"], prepend_bos=True, shaping=Shaping(tokens=-5))


# Batches


def test_taking_rows_drops_columns_that_are_padding_in_all_of_them() -> None:
    batch = encode_prompts(TOKENIZER, ["a b c", "b", "c a"], prepend_bos=False)
    part = take(batch, torch.tensor([2, 1]))
    assert part.tokens.tolist() == [[6, 4], [0, 5]]
    assert part.mask.tolist() == [[True, True], [False, True]]
    assert part.texts == ("c a", "b")


FIVE = encode_prompts(TOKENIZER, ["a", "b", "c", "a b", "b c"], prepend_bos=False)


def stream(seed: int = 0, batch_size: int = 3) -> PromptStream:
    return PromptStream(FIVE, batch_size, torch.Generator().manual_seed(seed))


def texts(stream: PromptStream, count: int) -> list[tuple[str, ...]]:
    return [batch.texts for batch in islice(stream, count)]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12])
def test_the_stream_gives_every_prompt_once_before_any_comes_again(batch_size: int) -> None:
    batches = texts(stream(batch_size=batch_size), 20)
    assert {len(batch) for batch in batches} == {batch_size}
    every = [text for batch in batches for text in batch]
    epochs = [every[start : start + 5] for start in range(0, len(every) - 4, 5)]
    assert all(sorted(epoch) == ["a", "a b", "b", "b c", "c"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_one_prompt_fills_a_batch() -> None:
    one = encode_prompts(TOKENIZER, ["a"], prepend_bos=False)
    assert next(PromptStream(one, 4, torch.Generator())).texts == ("a",) * 4


def test_the_order_is_the_generators() -> None:
    assert texts(stream(0), 10) == texts(stream(0), 10) != texts(stream(1), 10)
    stream_itself = stream(0)
    assert iter(stream_itself) is stream_itself


def test_the_batches_of_a_stream_have_no_common_padding() -> None:
    for batch in islice(stream(batch_size=1), 10):
        assert batch.mask.all()
        assert batch.tokens.tolist() == [
            [{"a": 4, "b": 5, "c": 6}[w] for w in batch.texts[0].split()]
        ]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7])
def test_a_stream_that_is_taken_up_anywhere_goes_on_as_if_it_had_not_stopped(
    tmp_path, batch_size: int
) -> None:
    every = texts(stream(batch_size=batch_size), 24)
    for stop in range(12):
        first = stream(batch_size=batch_size)
        assert texts(first, stop) == every[:stop]
        save_file(first.state_dict(), tmp_path / "state.safetensors")
        assert texts(first, 12) == every[stop : stop + 12]
        second = stream(seed=99, batch_size=batch_size)
        texts(second, 1)
        second.load_state_dict(load_file(tmp_path / "state.safetensors"))
        assert texts(second, 12) == every[stop : stop + 12]


def test_a_state_does_not_change_while_the_streams_go_on() -> None:
    first = stream()
    texts(first, 2)
    state = first.state_dict()
    copied = {name: tensor.clone() for name, tensor in state.items()}
    expected = texts(first, 9)
    for _ in range(2):
        second = stream(seed=5)
        second.load_state_dict(state)
        assert texts(second, 9) == expected
    assert {name: tensor.tolist() for name, tensor in state.items()} == {
        name: tensor.tolist() for name, tensor in copied.items()
    }


def test_a_stream_does_not_hold_on_to_the_state_that_it_was_given() -> None:
    first = stream()
    texts(first, 1)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = stream(seed=5)
    second.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert texts(second, 9) == texts(first, 9)

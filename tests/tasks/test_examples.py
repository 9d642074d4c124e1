"""Examples: what is learned of each, and that padded and packed rows are one and the same loss."""

import logging

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_exp.models.scratch import Scratch
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.held_out import next_token_loss
from rlhf_exp.tasks.examples import (
    IGNORED,
    Example,
    ExampleBatch,
    encode_demonstrations,
    encode_texts,
    pack,
    pad,
)
from rlhf_exp.tasks.protocol import Demonstration
from rlhf_exp.tasks.tokenizers import closed_word_tokenizer, word_tokenizer
from tests.builders import ARCHITECTURES, build_tokenizer, stretch

OPEN = word_tokenizer(["a", "b", "c"])  # ids 4, 5, 6; <bos> is 1, <eos> is 2
CLOSED = closed_word_tokenizer(["a", "b", "c"], pad="<PAD>", eos="<EOS>")  # 2, 3, 4; <EOS> is 1
EXAMPLES = [
    Example(tokens=[4, 5, 6, 7, 8, 9, 2], start=3),
    Example(tokens=[10, 11, 2], start=1),
    Example(tokens=[12, 13, 14, 15, 2], start=4),
    Example(tokens=[7, 2], start=1),
    Example(tokens=[9, 8, 7, 6, 5, 4, 2], start=1),
    Example(tokens=[4, 2], start=1),
]


def network(architecture: str) -> PreTrainedModel:
    """Weights far from their small initial ones: attention that leaks into another example, or a
    position that goes on from it, changes the loss by more than a tolerance."""
    settings = Scratch(architecture=architecture, d_model=16, num_heads=2, context_len=32)
    model, _ = settings.language_model(build_tokenizer, seed=0)
    stretch(model, seed=0)
    return model.eval()


def gradients(model: PreTrainedModel, batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = next_token_loss(model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_labels_are_the_tokens_from_the_first_learned_one_on():
    example = Example(tokens=[5, 6, 7, 2], start=2)
    assert example.labels == [-100, -100, 7, 2]
    assert len(example) == 4
    assert IGNORED == -100  # transformers' own
    assert Example(tokens=[5, 6], start=1).labels == [-100, 6]


def test_of_a_text_everything_after_the_first_token_is_learned():
    bos, bare = (encode_texts(t, ["a b c", "b"], limit=9) for t in (OPEN, CLOSED))
    assert [e.tokens for e in bos] == [[1, 4, 5, 6, 2], [1, 5, 2]]
    assert [e.tokens for e in bare] == [[2, 3, 4, 1], [3, 1]]
    assert [e.start for e in bos + bare] == [1] * 4


@pytest.mark.parametrize(
    ("tokenizer", "limit", "expected"),
    [
        (OPEN, 5, [[1, 4, 5, 6, 2], [1, 5, 2]]),
        (OPEN, 4, [[1, 4, 5, 2], [1, 5, 2]]),
        (OPEN, 3, [[1, 4, 2], [1, 5, 2]]),
        (CLOSED, 4, [[2, 3, 4, 1], [3, 1]]),
        (CLOSED, 3, [[2, 3, 1], [3, 1]]),
    ],
)
def test_texts_that_are_too_long_are_cut_counted_and_end_with_eos(
    tokenizer, limit, expected, caplog
):
    with caplog.at_level(logging.INFO):
        examples = encode_texts(tokenizer, ["a b c", "b"], limit=limit)
    assert [example.tokens for example in examples] == expected
    cut = len(expected[0]) < (5 if tokenizer is OPEN else 4)
    assert caplog.messages == ([f"1 of 2 texts are cut to {limit} tokens"] if cut else [])


def test_of_a_demonstration_only_the_response_and_eos_are_learned():
    demonstrations = [Demonstration("a b", " c a"), Demonstration("c", " b")]
    bare = encode_demonstrations(CLOSED, demonstrations, prepend_bos=False, limit=5)
    assert [e.tokens for e in bare] == [[2, 3, 4, 2, 1], [4, 3, 1]]
    assert [e.labels for e in bare] == [[-100, -100, 4, 2, 1], [-100, 3, 1]]
    # A tokenizer with BOS puts it there only if it is asked for.
    for prepend_bos, before in ((True, [1]), (False, [])):
        examples = encode_demonstrations(OPEN, demonstrations, prepend_bos=prepend_bos, limit=6)
        assert [e.tokens for e in examples] == [[*before, 4, 5, 6, 4, 2], [*before, 6, 5, 2]]
        ignored = [-100] * len(before)
        assert [e.labels for e in examples] == [
            [*ignored, -100, -100, 6, 4, 2],
            [*ignored, -100, 5, 2],
        ]


def test_a_demonstration_that_is_too_long_is_refused_not_cut():
    demonstrations = [Demonstration("c", " b"), Demonstration("a b", " c a")]
    encode_demonstrations(OPEN, demonstrations, prepend_bos=True, limit=6)
    expected = r"^model: a demonstration of 6 tokens .* context of 5; .*'a b'$"
    with pytest.raises(ConfigError, match=expected):
        encode_demonstrations(OPEN, demonstrations, prepend_bos=True, limit=5)


def test_a_word_that_a_closed_vocabulary_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"vocabulary does not hold every word of 'a zebra'"):
        encode_texts(CLOSED, ["a b", "a zebra"], limit=9)
    with pytest.raises(ConfigError, match=r"vocabulary does not hold every word of ' zebra'"):
        encode_demonstrations(CLOSED, [Demonstration("a", " zebra")], prepend_bos=False, limit=9)


def test_padding_is_one_example_a_row():
    batch = pad(EXAMPLES[:2])
    assert batch.tokens.tolist() == [[4, 5, 6, 7, 8, 9, 2], [10, 11, 2, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [
        [-100, -100, -100, 7, 8, 9, 2],
        [-100, 11, 2, -100, -100, -100, -100],
    ]
    assert batch.positions is None
    assert batch.num_learned == 6


def test_packing_fills_rows_the_longest_first():
    batch = pack(EXAMPLES, limit=9)
    assert batch.tokens.tolist() == [
        [4, 5, 6, 7, 8, 9, 2, 7, 2],
        [9, 8, 7, 6, 5, 4, 2, 4, 2],
        [12, 13, 14, 15, 2, 10, 11, 2, 0],
    ]
    assert batch.labels.tolist() == [
        [-100, -100, -100, 7, 8, 9, 2, -100, 2],
        [-100, 8, 7, 6, 5, 4, 2, -100, 2],
        [-100, -100, -100, -100, 2, -100, 11, 2, -100],
    ]
    assert batch.positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 0, 1],
        [0, 1, 2, 3, 4, 5, 6, 0, 1],
        [0, 1, 2, 3, 4, 0, 1, 2, 0],
    ]
    assert batch.num_learned == pad(EXAMPLES).num_learned == 15


@pytest.mark.parametrize("limit", [7, 8, 12, 32])
def test_packing_keeps_every_example_whole_and_within_the_limit(limit):
    batch = pack(EXAMPLES, limit=limit)
    assert batch.tokens.shape[1] <= limit
    found = []
    for tokens, labels, positions in zip(
        batch.tokens.tolist(), batch.labels.tolist(), batch.positions.tolist(), strict=True
    ):
        starts = [i for i, position in enumerate(positions) if position == 0]
        for i, j in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if tokens[i]:  # padding is zeros
                assert positions[i:j] == list(range(j - i))
                found.append((tokens[i:j], labels[i:j]))
    assert sorted(found) == sorted((e.tokens, e.labels) for e in EXAMPLES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("limit", [9, 32])
def test_packed_and_padded_examples_have_the_same_loss_and_gradients(architecture, limit):
    model = network(architecture)
    packed = pack(EXAMPLES, limit=limit)
    assert len(packed.tokens) < len(EXAMPLES)
    padded_loss, padded = gradients(model, pad(EXAMPLES))
    packed_loss, ours = gradients(model, packed)
    torch.testing.assert_close(packed_loss, padded_loss, rtol=1e-5, atol=0)
    # Entries that are 0 but for rounding are measured by the largest of all gradients.
    scale = max(gradient.abs().max().item() for gradient in padded.values())
    for name, gradient in padded.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * scale)
    # And a leak would be seen: without positions the examples of a row attend to each other.
    leaking = ExampleBatch(tokens=packed.tokens, labels=packed.labels)
    assert (next_token_loss(model, leaking) - padded_loss).abs() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_the_mean_over_the_learned_tokens_of_each_example_by_itself(architecture):
    model = network(architecture)
    losses = []
    with torch.no_grad():
        for example in EXAMPLES:
            logits = model(input_ids=torch.tensor([example.tokens])).logits[0].double()
            for i in range(example.start, len(example)):
                losses.append(-logits[i - 1].log_softmax(dim=-1)[example.tokens[i]].item())
        expected = sum(losses) / len(losses)
        for batch in (pad(EXAMPLES), pack(EXAMPLES, limit=16)):
            assert batch.num_learned == len(losses)
            assert next_token_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_an_answer_without_a_prompt_is_refused():
    tokenizer = word_tokenizer(["a", "b"])
    answer = [Demonstration("", " a b")]
    with pytest.raises(ConfigError, match=r"the answer ' a b' has a prompt of no tokens"):
        encode_demonstrations(tokenizer, answer, prepend_bos=False, limit=9)
    [example] = encode_demonstrations(tokenizer, answer, prepend_bos=True, limit=9)
    assert example.start == 1

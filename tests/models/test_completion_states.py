"""Only the hidden states that are needed, and those of a plain pass over whole sequences."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from rlhf_exp.functional.logprobs import completion_part
from rlhf_exp.kernels.vocab_head import token_statistics
from rlhf_exp.models.cache import prompt_cache
from rlhf_exp.models.finetune import LastLayers, Lora
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.types import Completions, Layout
from tests.builders import (
    assert_near,
    cut,
    plain_forward,
    ragged_tokens,
    sliding_policy,
    tiny_policy,
)

ROWS, PROMPT, GEN_LEN = 5, 6, 4
# Of the completions; the last column is real in no row of the first kind.
EARLY = (2, 3, 1, 3, 1)
FULL = (4, 4, 4, 4, 4)
LATE = (2, 4, 1, 3, 1)


def completions(
    kind: str, lengths: tuple[int, ...] = LATE, *, prompt_len: int = PROMPT
) -> Completions:
    """Rows of so many tokens after one prompt for all, the same with padding before it, several
    prompts of one length, or prompts of several lengths."""
    tokens, _ = ragged_tokens(ROWS, prompt_len + GEN_LEN, seed=3)
    tokens = torch.where(tokens == 0, 7, tokens)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if kind in ("shared", "shared and padded"):
        tokens[:, :prompt_len] = tokens[0, :prompt_len]
    if kind == "shared and padded":
        mask[:, :2] = False
    if kind == "ragged":
        mask[:, :prompt_len] = torch.arange(prompt_len) >= torch.arange(ROWS)[:, None]
    mask[:, prompt_len:] = torch.arange(GEN_LEN) < torch.tensor(lengths)[:, None]
    return cut(tokens * mask, mask, prompt_len)


KINDS = ("shared", "shared and padded", "even", "ragged")


def expected_states(policy: TransformerWithValueHead, of: Completions) -> Tensor:
    return completion_part(plain_forward(policy, *of.sequences)[2], of.prompt_len)


def gradients(policy: TransformerWithValueHead, states: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every number of `states` [token d_model] has another weight."""
    policy.zero_grad()
    weights = torch.linspace(-1, 1, states.numel()).view(states.shape)
    (states * weights).sum().backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def assert_plain(
    policy: TransformerWithValueHead, of: Completions, layout: Layout, *, trains: bool = True
) -> None:
    """States of real tokens and their gradients are those of the plain pass."""
    states = policy.completion_states(of, layout)
    columns = of.mask.shape[1] if layout.whole else int(of.mask.sum(dim=1).max())
    assert states.shape[:2] == (ROWS, columns)
    expected = expected_states(policy, of)
    real = of.mask[:, :columns]
    assert_near(states[real], expected[of.mask])
    assert_near(layout.pick(states), expected[of.mask])
    assert states.isfinite().all()
    if not trains:
        return
    seen = gradients(policy, states[real])
    wanted = gradients(policy, expected_states(policy, of)[of.mask])
    assert seen.keys() == wanted.keys() != set()
    assert max(gradient.abs().max() for gradient in wanted.values()) > 0.1
    for name, gradient in wanted.items():
        assert_near(seen[name], gradient)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("lengths", [EARLY, LATE, FULL], ids=["early", "late", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_a_plain_pass(
    architecture: str, kind: str, lengths: tuple[int, ...], whole: bool
) -> None:
    of = completions(kind, lengths)
    assert_plain(tiny_policy(architecture), of, Layout.of(of, whole=whole))


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_of_one_token_needs_the_prompt_alone(architecture: str, kind: str) -> None:
    of = completions(kind, (1,) * ROWS)
    policy = tiny_policy(architecture)
    for one in (of, cut(*(x[:, : PROMPT + 1] for x in of.sequences), PROMPT)):
        with shapes(policy) as seen:
            policy.completion_states(one, Layout.of(one))
        assert seen == [(1 if kind.startswith("shared") else ROWS, PROMPT)]
        assert_plain(policy, one, Layout.of(one))


@pytest.mark.parametrize("kind", KINDS)
def test_with_activations_computed_again(architecture: str, kind: str) -> None:
    policy = tiny_policy(architecture)
    policy.checkpoint_gradients()
    of = completions(kind)
    assert_plain(policy, of, Layout.of(of))


@pytest.mark.parametrize("trained", [LastLayers(num_layers_unfrozen=1), Lora(rank=4)])
def test_with_part_of_the_weights_trained(architecture: str, trained: LastLayers | Lora) -> None:
    policy = tiny_policy(architecture)
    trained.attach(policy, seed=0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.2
    of = completions("shared and padded")
    assert_plain(policy, of, Layout.of(of))


def test_rows_of_a_batch(architecture: str) -> None:
    # A minibatch of a layout is that of the minibatch.
    policy = tiny_policy(architecture)
    for kind in KINDS:
        of = completions(kind)
        index = torch.tensor([2, 0, 4])
        states = policy.completion_states(of[index], Layout.of(of)[index])
        assert states.shape[:2] == (3, 2)
        expected = expected_states(policy, of)[index, :2]
        mask = of.mask[index, :2]
        assert_near(states[mask], expected[mask])


@contextmanager
def shapes(policy: TransformerWithValueHead) -> Iterator[list[tuple[int, int]]]:
    """Rows and columns of each pass."""
    seen: list[tuple[int, int]] = []
    hook = policy.language_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            tuple(kwargs["inputs_embeds" if "inputs_embeds" in kwargs else "input_ids"].shape[:2])
        ),
        with_kwargs=True,
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize(
    ("kind", "prompt_len", "lengths", "expected"),
    [
        # The last token of the longest row is not run.
        ("shared", 6, LATE, [(1, 6), (5, 3)]),
        ("shared", 6, EARLY, [(1, 6), (5, 2)]),
        ("shared and padded", 6, LATE, [(1, 6), (5, 3)]),
        ("even", 6, EARLY, [(5, 8)]),
        ("ragged", 6, LATE, [(5, 9)]),
        # Saved are 4/5 of the prompt's columns: 1 of 4 are .2 of all, 2 of 5 are .32.
        ("shared", 1, LATE, [(5, 4)]),
        ("shared", 2, LATE, [(1, 2), (5, 3)]),
    ],
)
def test_what_is_run(
    kind: str, prompt_len: int, lengths: tuple[int, ...], expected: list[tuple[int, int]]
) -> None:
    policy = tiny_policy()
    of = completions(kind, lengths, prompt_len=prompt_len)
    with shapes(policy) as seen:
        policy.completion_states(of, Layout.of(of))
    assert seen == expected
    # With fixed shapes, and where blocks are computed again, everything is run at once.
    with shapes(policy) as seen:
        policy.completion_states(of, Layout.of(of, whole=True))
    assert seen == [(5, prompt_len + GEN_LEN - 1)]
    policy.checkpoint_gradients()
    with shapes(policy) as seen:
        policy.completion_states(of, Layout.of(of))
    assert seen == [(5, prompt_len + max(lengths) - 1)]
    assert_plain(policy, of, Layout.of(of), trains=False)


def test_one_row_is_run_at_once() -> None:
    policy = tiny_policy()
    of = completions("shared")[torch.tensor([1])]
    with shapes(policy) as seen:
        states = policy.completion_states(of, Layout.of(of))
    assert seen == [(1, PROMPT + 3)]
    assert_near(states, expected_states(policy, of))


def test_windows_that_slide_are_run_at_once() -> None:
    # Their caches forget the prompt's first tokens.
    policy = sliding_policy()
    assert prompt_cache(policy.language_model) is None
    assert prompt_cache(tiny_policy("llama").language_model) is not None
    of = completions("shared")
    with shapes(policy) as seen:
        policy.completion_states(of, Layout.of(of))
    assert seen == [(ROWS, PROMPT + 3)]
    assert_plain(policy, of, Layout.of(of))


def statistics_loss(
    policy: TransformerWithValueHead, of: Completions, layout: Layout, *, own: bool
) -> Tensor:
    """Statistics of the head's own gradient, or of autograd's."""
    if own:
        with policy.learning_head() as head:
            hidden = layout.pick(policy.completion_states(of, layout))
    else:
        head, hidden = policy.head, layout.pick(policy.completion_states(of, layout))
    ref_head = head._replace(weight=head.weight.detach().roll(1, 0), gradient=None)
    tokens, ref_hidden = layout.pick(of.tokens), hidden.detach().roll(1, 0)
    columns = token_statistics(hidden, head, tokens, ref_hidden, ref_head, temperature=0.9)
    return sum(column.sum() for column in columns)


@pytest.mark.parametrize("kind", ["shared", "even", "ragged"])
def test_the_learning_heads_gradients_are_autograds(architecture: str, kind: str) -> None:
    # GPT-2's embedding has the same weights, Llama's does not.
    policy = tiny_policy(architecture)
    of = completions(kind)
    layout = Layout.of(of)
    statistics_loss(policy, of, layout, own=False).backward()
    expected = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    for times in (1, 2):  # accumulated, as over micro-batches
        statistics_loss(policy, of, layout, own=True).backward()
        seen = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        assert seen.keys() == expected.keys()
        for name, gradient in expected.items():
            assert not seen[name].is_sparse
            assert_near(seen[name], times * gradient)
    assert not policy.language_model.get_input_embeddings().sparse


def test_a_frozen_head_learns_nothing() -> None:
    policy = tiny_policy("llama")
    policy.head.weight.requires_grad_(False)
    with policy.learning_head() as head:
        assert head.gradient is None
        assert head.weight is policy.head.weight
    assert policy.head.weight.grad is None


def test_the_embedding_is_dense_again_after_a_pass_that_failed() -> None:
    policy = tiny_policy("gpt2")
    embedding = policy.language_model.get_input_embeddings()
    with policy.learning_head():
        assert embedding.sparse
    with pytest.raises(IndexError), policy.learning_head():
        policy.hidden_states(torch.tensor([[1000]]), None)
    assert not embedding.sparse

import pytest
import torch

from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from tests.builders import assert_near, prompts, tiny_policy
from tests.rollout.oracles import RAGGED, SHARED

CASES = pytest.mark.parametrize("texts", [SHARED, RAGGED], ids=["shared", "ragged"])
# Greedy rows of one prompt are all the same; several prompts of one length are neither case above.
EVEN = ("one two", "two three", "five nine", ". no", "no .", "zero zero")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("texts", [SHARED, RAGGED, EVEN], ids=["shared", "ragged", "even"])
def test_greedy_decoding_is_transformer_lens_own(architecture, texts):
    policy = tiny_policy(architecture)
    batch = prompts(policy, texts)
    cached, bridge = (
        cls(gen_len=16, top_k=1)(policy, batch, generator())
        for cls in (CachedSampler, BridgeSampler)
    )
    assert torch.equal(cached.completions.tokens, bridge.completions.tokens)
    assert cached.completions.texts == bridge.completions.texts
    for name in ("logprobs", "values", "hidden", "kept_mass"):
        assert_near(getattr(cached, name), getattr(bridge, name))


def first_column(tokens: torch.Tensor, token: int) -> list[int]:
    """Where each row first holds the token, the row's length if nowhere."""
    return [[*row, token].index(token) for row in tokens.tolist()]


@pytest.mark.parametrize("texts", [RAGGED, EVEN], ids=["ragged", "even"])
def test_greedy_decoding_ends_where_transformer_lens_does(architecture, texts):
    policy = tiny_policy(architecture)
    batch = prompts(policy, texts)
    endless = CachedSampler(gen_len=16, top_k=1)(policy, batch, generator()).completions.tokens
    # The word that the rows first emit at the most different steps ends them from here on.
    eos = max(range(4, 16), key=lambda token: len(set(first_column(endless, token))))
    ends = first_column(endless, eos)
    assert len(set(ends)) >= 3
    policy.tokenizer.eos_token = policy.tokenizer.convert_ids_to_tokens(eos)

    cached, bridge = (
        cls(gen_len=16, top_k=1, stop_at_eos=True)(policy, batch, generator())
        for cls in (CachedSampler, BridgeSampler)
    )
    reached = torch.arange(16) <= torch.tensor(ends)[:, None]
    for generation in (cached, bridge):
        assert torch.equal(generation.completions.mask, reached)
        assert torch.equal(generation.completions.tokens, endless * reached)
    assert cached.completions.texts == bridge.completions.texts
    for name in ("logprobs", "values", "hidden", "kept_mass"):
        assert_near(getattr(cached, name), getattr(bridge, name))


def work(policy, sampler, texts) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Rows and columns of each call of the transformer, and the mask of the completions."""
    calls: list[tuple[int, int]] = []
    hook = policy.language_model.base_model.register_forward_pre_hook(
        # Without padding the transformer is given embeddings in place of tokens.
        lambda module, args, kwargs: calls.append(
            tuple(kwargs["inputs_embeds" if "inputs_embeds" in kwargs else "input_ids"].shape[:2])
        ),
        with_kwargs=True,
    )
    mask = sampler(policy, prompts(policy, texts), generator()).completions.mask
    hook.remove()
    return calls, mask


@CASES
def test_rows_that_ended_are_computed_no_further(architecture, texts):
    policy = tiny_policy(architecture)
    sampler = CachedSampler(gen_len=14, stop_at_eos=True, temperature=3.0)
    calls, mask = work(policy, sampler, texts * 3)
    assert mask.sum(dim=1).unique().numel() > 3
    # A row that ended with column t takes no part in the pass that column t + 1 is sampled from.
    rows = [int(mask[:, t].sum()) for t in range(1, 14)]
    prefill = (1, 4) if texts == SHARED else (18, 6)
    assert calls == [prefill, *((count, 1) for count in rows if count)]


def test_nothing_is_computed_once_all_rows_ended():
    policy = tiny_policy("gpt2")
    batch = prompts(policy, ["zero"] * 4)
    greedy = CachedSampler(gen_len=3, top_k=1)(policy, batch, generator()).completions.tokens
    policy.tokenizer.eos_token = policy.tokenizer.convert_ids_to_tokens(greedy[0, 1].item())
    assert greedy[0, 0] != greedy[0, 1]
    calls, mask = work(policy, CachedSampler(gen_len=20, top_k=1, stop_at_eos=True), ["zero"] * 4)
    assert mask.sum(dim=1).tolist() == [2] * 4
    assert calls == [(1, 2), (4, 1)]


def test_a_full_run_makes_one_call_a_token():
    calls, _ = work(tiny_policy(), CachedSampler(gen_len=5), SHARED)
    # The last token is sampled and not run.
    assert calls == [(1, 4), (6, 1), (6, 1), (6, 1), (6, 1)]


def test_equal_rows_with_padding_are_not_taken_for_a_shared_prompt(architecture):
    # All rows hold the same ids, but of one the first is padding.
    policy = tiny_policy(architecture)
    batch = prompts(policy, ["one two", "one two"])
    mask = batch.mask.clone()
    mask[1, 0] = False
    batch = type(batch)(tokens=batch.tokens, mask=mask, rows=batch.rows)
    alone = [
        CachedSampler(gen_len=6, top_k=1)(policy, batch[torch.tensor([row])], generator())
        for row in (0, 1)
    ]
    both = CachedSampler(gen_len=6, top_k=1)(policy, batch, generator())
    for row in (0, 1):
        assert torch.equal(both.completions.tokens[row], alone[row].completions.tokens[0])
        assert_near(both.logprobs[row], alone[row].logprobs[0])
    assert (alone[0].hidden[0, 0] - alone[1].hidden[0, 0]).abs().max() > 0.01


def test_rows_do_not_depend_on_one_another(architecture):
    policy = tiny_policy(architecture)
    batch = prompts(policy, RAGGED)
    order = torch.tensor([3, 1, 4, 0, 5, 2])
    sampler = CachedSampler(gen_len=8, top_k=1)
    one, other = (sampler(policy, rows, generator()) for rows in (batch, batch[order]))
    assert torch.equal(other.completions.tokens, one.completions.tokens[order])
    assert other.completions.texts == one[order].completions.texts
    assert_near(other.logprobs, one.logprobs[order])

"""What stands left of a prompt changes nothing that is computed after it."""

import copy

import pytest
import torch
from torch import Tensor

from rlhf_exp.functional.logprobs import completion_logits, completion_part, token_logprobs
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.measure import measure
from rlhf_exp.types import Generation, PromptBatch, Rollout
from tests.builders import WORDS, assert_near, prompts, stretch, tiny_policy
from tests.rollout.oracles import RAGGED

GREEDY = CachedSampler(gen_len=5, top_k=1, stop_at_eos=True)


def behind_garbage(batch: PromptBatch, extra: int) -> PromptBatch:
    """The prompts with `extra` more columns of padding, every column of it filled at random."""
    generator = torch.Generator().manual_seed(extra)
    mask = torch.nn.functional.pad(batch.mask, (extra, 0))
    garbage = torch.randint(0, 4 + len(WORDS), mask.shape, generator=generator)
    tokens = torch.where(mask, torch.nn.functional.pad(batch.tokens, (extra, 0)), garbage)
    return PromptBatch(tokens=tokens, mask=mask, rows=batch.rows)


def greedy(policy: TransformerWithValueHead, batch: PromptBatch) -> Generation:
    return GREEDY(policy, batch, torch.Generator())


@torch.no_grad()
def full_pass(
    policy: TransformerWithValueHead, prompts: PromptBatch, generation: Generation
) -> tuple[Tensor, Tensor]:
    """Log-probs and values of the completions behind these prompts, without a cache."""
    completions = generation.completions
    tokens = torch.cat([prompts.tokens, completions.tokens], dim=1)
    logits, values = policy(tokens, torch.cat([prompts.mask, completions.mask], dim=1))
    start = prompts.tokens.shape[1]
    logprobs = token_logprobs(completion_logits(logits, start), completions.tokens)
    return logprobs * completions.mask, completion_part(values, start) * completions.mask


def measured(policy: TransformerWithValueHead, generation: Generation) -> Rollout:
    """Against a reference that the policy is some way from."""
    other = copy.deepcopy(policy)
    stretch(other.language_model, seed=7)
    scores = torch.zeros(len(generation.completions.texts))
    return measure(policy, other.frozen_reference(), generation, scores, temperature=1.0)


def ending(architecture: str) -> tuple[TransformerWithValueHead, PromptBatch, Generation]:
    """A policy that ends some of its greedy completions, the prompts, and these completions."""
    policy = tiny_policy(architecture)
    batch = prompts(policy, RAGGED)
    endless = greedy(policy, batch).completions.tokens
    ends = {token: (endless[:, 1:4] == token).any(dim=1).sum() for token in range(4, 16)}
    eos = min(token for token, rows in ends.items() if rows)
    policy.tokenizer.eos_token = policy.tokenizer.convert_ids_to_tokens(eos)
    generation = greedy(policy, batch)
    assert not generation.completions.mask.all()
    return policy, batch, generation


@pytest.mark.parametrize("extra", [0, 1, 4])
def test_padding_and_what_it_holds_change_no_rollout(architecture: str, extra: int) -> None:
    policy, batch, narrow = ending(architecture)
    padded = behind_garbage(batch, extra)
    assert not torch.equal(padded.tokens[:, extra:], batch.tokens)
    wide = greedy(policy, padded)
    assert torch.equal(wide.completions.tokens, narrow.completions.tokens)
    assert torch.equal(wide.completions.mask, narrow.completions.mask)
    assert wide.completions.texts == narrow.completions.texts
    for name in ("logprobs", "values", "hidden"):
        assert_near(getattr(wide, name), getattr(narrow, name))
    one, other = measured(policy, narrow), measured(policy, wide)
    assert one.kl.max() > 0.5
    for name in ("kl", "entropy", "ref_logprobs", "ref_hidden"):
        assert_near(getattr(other, name), getattr(one, name))


@pytest.mark.parametrize("extra", [0, 1, 4])
def test_padding_and_what_it_holds_change_no_full_pass(architecture: str, extra: int) -> None:
    policy, batch, generation = ending(architecture)
    logprobs, values = full_pass(policy, behind_garbage(batch, extra), generation)
    assert_near(logprobs, generation.logprobs)
    assert_near(values, generation.values)
    for ours, expected in zip(
        full_pass(policy, batch, generation), (logprobs, values), strict=True
    ):
        assert_near(ours, expected)


def test_a_row_is_what_it_is_alone(architecture: str) -> None:
    policy, batch, together = ending(architecture)
    for row in range(len(RAGGED)):
        length = int(batch.mask[row].sum())
        alone = PromptBatch(
            tokens=batch.tokens[row : row + 1, -length:],
            mask=batch.mask[row : row + 1, -length:],
            rows=batch.rows[row : row + 1],
        )
        generation = greedy(policy, alone)
        assert torch.equal(generation.completions.tokens[0], together.completions.tokens[row])
        for name in ("logprobs", "values", "hidden"):
            assert_near(getattr(generation, name)[0], getattr(together, name)[row])
        kl = measured(policy, generation).kl[0]
        assert_near(kl, measured(policy, together).kl[row])

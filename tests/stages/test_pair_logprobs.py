"""Log-probs of pairs: those of the textbook, whatever the padding and whoever computes them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_exp.functional.logprobs import completion_logits, token_logprobs
from rlhf_exp.models.finetune import Finetune, Full, LastLayers, Lora
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import Reference
from rlhf_exp.stages.pair_logprobs import ReferencedPairs
from rlhf_exp.tasks.pair_tokens import EncodedPair, encode_pairs

from ..builders import assert_near
from ..rl.toy import ToyPairs, saved_model

CPU = torch.device("cpu")


def encoded(policy: TransformerWithValueHead, count: int = 12) -> list[EncodedPair]:
    pairs = ToyPairs().pair_split().train[8 : 8 + count]  # some prompts are longer than others
    return encode_pairs(policy.tokenizer, pairs, ["?"] * count, prepend_bos=True, limit=16)


def saved_policy(path: Path) -> TransformerWithValueHead:
    network, tokenizer = saved_model(path).language_model(None, seed=0)
    return TransformerWithValueHead(network, tokenizer, value_head=False)


def referenced(
    pairs: Sequence[EncodedPair], reference: Reference, batch_size: int = 5
) -> ReferencedPairs:
    return ReferencedPairs(pairs, reference, batch_size=batch_size, dtype="fp32", device=CPU)


def by_hand(policy: TransformerWithValueHead, prompt: list[int], answer: list[int]) -> Tensor:
    """The sum over the answer's tokens, alone and without padding."""
    tokens = torch.tensor([prompt + answer])
    logits = policy.language_model(input_ids=tokens).logits.double()
    logits = completion_logits(logits, len(prompt))
    return token_logprobs(logits, torch.tensor([answer])).sum()


def test_they_are_the_sums_of_each_answer_alone(tmp_path: Path) -> None:
    policy = saved_policy(tmp_path)
    pairs = encoded(policy)
    assert len({len(p.prompt) for p in pairs}) > 1
    assert len({len(p.chosen) for p in pairs} | {len(p.rejected) for p in pairs}) > 2
    both = referenced(pairs, policy).logprobs(policy, [*range(len(pairs))])
    for name, sums in zip(("chosen", "rejected"), both, strict=True):
        expected = [by_hand(policy, p.prompt, getattr(p, name)) for p in pairs]
        assert_near(sums, torch.stack(expected).float())


def test_gradients_are_those_of_the_textbook(tmp_path: Path) -> None:
    policy = saved_policy(tmp_path)
    pairs = encoded(policy, count=4)
    chosen, rejected = referenced(pairs, policy).logprobs(policy, [3, 0, 2])
    (chosen.sum() - 2 * rejected.sum()).backward()
    own = {name: p.grad.clone() for name, p in policy.language_model.named_parameters()}
    policy.language_model.zero_grad()
    for i in (3, 0, 2):
        for answer, weight in ((pairs[i].chosen, 1), (pairs[i].rejected, -2)):
            (weight * by_hand(policy, pairs[i].prompt, answer)).backward()
    for name, parameter in policy.language_model.named_parameters():
        assert_near(own[name], parameter.grad)


def test_neither_the_other_pairs_of_a_batch_nor_their_order_matter(tmp_path: Path) -> None:
    policy = saved_policy(tmp_path)
    pairs = encoded(policy)
    data = referenced(pairs, policy, batch_size=12)
    alone = referenced(pairs, policy, batch_size=1)
    for whole, single in zip(data.all_logprobs(policy), alone.all_logprobs(policy), strict=True):
        assert_near(whole, single)
    some = data.logprobs(policy, [7, 2])
    for name in ("chosen", "rejected"):
        assert_near(getattr(some, name), getattr(data.all_logprobs(policy), name)[[7, 2]])


@pytest.mark.parametrize(
    "finetune", [Full(), LastLayers(num_layers_unfrozen=1), Lora(rank=2)], ids=lambda f: str(f)[:4]
)
def test_the_reference_stays_what_the_policy_was(finetune: Finetune, tmp_path: Path) -> None:
    policy = saved_policy(tmp_path)
    pairs = encoded(policy)
    start = referenced(pairs, policy).all_logprobs(policy)
    reference = finetune.attach(policy, seed=0)
    data = referenced(pairs, reference)
    index = [*range(len(pairs))]
    for own, first in zip(data.reference(index), start, strict=True):
        assert torch.equal(own, first)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    for now, own in zip(data.all_logprobs(policy), data.reference(index), strict=True):
        assert (now - own).abs().max() > 0.1
    for later, own in zip(data.all_logprobs(reference), data.reference(index), strict=True):
        assert torch.equal(later, own)


def test_lengths_and_tokens_are_counted(tmp_path: Path) -> None:
    policy = saved_policy(tmp_path)
    pairs = [
        replace(
            pair, prompt=[1, 4][: 2 - i], chosen=[5, 6, 2][: 3 - 2 * i], rejected=[7, 2][: 1 + i]
        )
        for i, pair in enumerate(encoded(policy, count=2))
    ]
    data = referenced(pairs, policy)
    assert data.lengths == [2 + 3, 1 + 2]
    assert [data.num_chosen_tokens(index) for index in ([0], [1], [0, 1, 1])] == [3, 1, 5]

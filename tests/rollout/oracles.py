"""What a generation must be, worked out from plain forward passes and counting."""

import math
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.types import Generation
from tests.builders import assert_near, plain_forward

SHARED = ("one two three",) * 6
RAGGED = ("one two three", "four", "five six seven eight nine", "four", "no .", "zero")


@torch.no_grad()
def assert_measured(
    generation: Generation, policy: TransformerWithValueHead, *, temperature: float = 1.0
) -> None:
    """Log-probs, values and hidden states are those of a full pass over the finished sequences,
    and 0 in the padding."""
    completions = generation.completions
    logits, values, hidden = plain_forward(policy, *completions.sequences)
    last = completions.prompts.tokens.shape[1] - 1
    mask = completions.mask
    for row, column in mask.nonzero().tolist():
        scaled = (logits[row, last + column].double() / temperature).tolist()
        logprob = scaled[completions.tokens[row, column]] - log_sum_exp(scaled)
        assert generation.logprobs[row, column].item() == pytest.approx(logprob, abs=1e-5)
    assert_near(generation.values[mask], values[:, last:-1][mask])
    assert_near(generation.hidden[mask], hidden[:, last:-1][mask])
    assert_empty_padding(generation)


def assert_empty_padding(generation: Generation) -> None:
    completions = generation.completions
    for tensor in (
        completions.tokens,
        generation.logprobs,
        generation.values,
        generation.hidden,
        generation.kept_mass,
    ):
        assert not tensor[~completions.mask].any()


def log_sum_exp(scaled: list[float]) -> float:
    largest = max(scaled)
    return largest + math.log(math.fsum(math.exp(x - largest) for x in scaled))


def filtered_probs(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> dict[int, float]:
    """The probability of each token that may be sampled, by loops over [vocab]."""
    scaled = [x / temperature for x in logits.tolist()]
    total = log_sum_exp(scaled)
    probs = {token: math.exp(x - total) for token, x in enumerate(scaled)}
    kept = sorted(probs, key=probs.__getitem__, reverse=True)[:top_k]
    mass = math.fsum(probs[token] for token in kept)
    nucleus: dict[int, float] = {}
    for token in kept:
        if sum(nucleus.values()) >= top_p:
            break
        nucleus[token] = probs[token] / mass
    rest = math.fsum(nucleus.values())
    return {token: prob / rest for token, prob in nucleus.items()}


def chi_squared_p(sampled: Iterable[object], probs: dict[object, float]) -> float:
    """The probability of counts at least this far from what the probabilities lead to expect;
    outcomes expected less than five times are counted together. 0 for an impossible outcome."""
    counts = Counter(sampled)
    if counts.keys() - probs.keys():
        return 0.0
    num_samples = counts.total()
    rare = [outcome for outcome in probs if probs[outcome] * num_samples < 5]
    cells = [(counts[o], probs[o] * num_samples) for o in probs if o not in rare]
    if rare:
        cells.append((sum(counts[o] for o in rare), sum(probs[o] for o in rare) * num_samples))
    statistic = math.fsum((seen - expected) ** 2 / expected for seen, expected in cells)
    half_degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half_degrees, torch.tensor(statistic / 2).double()).item()

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_exp.functional.sampling import draw_tokens, filter_logits

INF = math.inf


def log(probs: list[list[float]], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[math.log(p) for p in row] for row in probs], dtype=dtype)


def kept(filtered: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in filtered != -INF]


def test_without_limits_only_the_temperature_acts(dtype):
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -INF]], dtype=dtype)
    assert torch.equal(filter_logits(logits), logits)
    expected = torch.tensor([[2.0, -4.0, 1.0], [0.0, 6.0, -INF]], dtype=dtype)
    assert torch.equal(filter_logits(logits, temperature=0.5), expected)


def test_top_k_keeps_the_largest(dtype):
    logits = torch.tensor([[1.0, 5.0, -2.0, 3.0], [4.0, 0.0, 2.0, 1.0]], dtype=dtype)
    expected = torch.tensor([[-INF, 5.0, -INF, 3.0], [4.0, -INF, 2.0, -INF]], dtype=dtype)
    assert torch.equal(filter_logits(logits, top_k=2), expected)
    assert kept(filter_logits(logits, top_k=1)) == [[1], [0]]
    assert logits[0, 0] == 1.0  # the input is left as it was


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_top_k_keeps_exactly_k_among_ties(top_k, dtype):
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [7.0, 1.0, 1.0, 1.0, 0.0]], dtype=dtype)
    rows = kept(filter_logits(logits, top_k=top_k))
    assert [len(row) for row in rows] == [top_k, top_k]
    assert 0 in rows[1]  # the one that is not tied is always there
    assert 4 not in rows[1]


@pytest.mark.parametrize("top_k", [3, 4, 1000])
def test_top_k_of_the_whole_vocabulary_or_more_keeps_all(top_k, dtype):
    logits = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
    assert torch.equal(filter_logits(logits, top_k=top_k), logits)


# Of 0.1, 0.4, 0.2, 0.3: the ranks are tokens 1, 3, 2, 0 with masses 0.4, 0.7, 0.9, 1.
@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [
        (1e-9, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 2, 3]),
        (0.89, [1, 2, 3]),
        (0.91, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, tokens, dtype):
    # The second row is the first reversed, so that each has its own order.
    logits = log([[0.1, 0.4, 0.2, 0.3], [0.3, 0.2, 0.4, 0.1]], dtype)
    filtered = filter_logits(logits, top_p=top_p)
    assert kept(filtered) == [tokens, sorted(3 - token for token in tokens)]
    assert torch.equal(filtered[filtered != -INF], logits[filtered != -INF])


def test_top_p_is_reached_by_equality_and_cuts_ties(dtype):
    # Four tokens of 1/4 exactly: two of them have mass 1/2, no third is needed.
    rows = kept(filter_logits(torch.zeros(3, 4, dtype=dtype), top_p=0.5))
    assert [len(row) for row in rows] == [2, 2, 2]


def test_top_p_acts_on_what_top_k_has_left():
    # After top_k=2 the masses are 4/7 and 3/7, so that 0.5 needs one token; before it, two.
    logits = log([[0.4, 0.3, 0.2, 0.1]])
    assert kept(filter_logits(logits, top_k=2, top_p=0.5)) == [[0]]
    assert kept(filter_logits(logits, top_p=0.5)) == [[0, 1]]
    # And 0.6 needs both, of which none is outside the two.
    assert kept(filter_logits(logits, top_k=2, top_p=0.6)) == [[0, 1]]


def test_temperature_acts_before_top_p():
    # At temperature 1/2 the probabilities are squared: 16, 9, 4, 1 of 30.
    logits = log([[0.4, 0.3, 0.2, 0.1]])
    assert kept(filter_logits(logits, temperature=0.5, top_p=0.5)) == [[0]]
    assert kept(filter_logits(logits, temperature=1.0, top_p=0.5)) == [[0, 1]]
    # At temperature 2 their roots: 0.633, 0.548, 0.447, 0.316 of 1.943, so 0.85 needs all four.
    assert kept(filter_logits(logits, temperature=2.0, top_p=0.85)) == [[0, 1, 2, 3]]
    assert kept(filter_logits(logits, temperature=1.0, top_p=0.85)) == [[0, 1, 2]]


def test_permuting_the_batch_permutes_the_output(generator, dtype):
    logits = torch.randn(5, 9, generator=generator, dtype=dtype)
    order = torch.tensor([3, 1, 4, 0, 2])
    filtered = filter_logits(logits, temperature=0.7, top_k=6, top_p=0.8)
    permuted = filter_logits(logits[order], temperature=0.7, top_k=6, top_p=0.8)
    assert torch.equal(permuted, filtered[order])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=rf"temperature={temperature} must be > 0.*top_k=1"):
        filter_logits(torch.zeros(1, 3), temperature=temperature)


@pytest.mark.parametrize("top_k", [0, -5])
def test_a_top_k_below_one_is_refused(top_k):
    with pytest.raises(ValueError, match=rf"top_k={top_k} must be at least 1"):
        filter_logits(torch.zeros(1, 3), top_k=top_k)


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.5, math.nan])
def test_a_top_p_outside_its_range_is_refused(top_p):
    with pytest.raises(ValueError, match=rf"top_p={top_p} must be in \(0, 1\]"):
        filter_logits(torch.zeros(1, 3), top_p=top_p)


def sample(filtered: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each row, as the cached sampler draws it."""
    return draw_tokens(filtered.softmax(dim=-1), torch.rand(len(filtered), generator=generator))


def chi_squared(counts: list[int], probs: list[float]) -> float:
    num_samples = sum(counts)
    return math.fsum(
        (count - num_samples * p) ** 2 / (num_samples * p)
        for count, p in zip(counts, probs, strict=True)
        if p > 0
    )


def test_samples_follow_the_filtered_distribution(generator):
    # Tokens 1, 3, 2 with 4 : 3 : 2 are left of the first row by top_k=3; the second row, sampled
    # at the same time, is its reverse.
    logits = log([[0.1, 0.4, 0.2, 0.3], [0.3, 0.2, 0.4, 0.1]]).repeat(20_000, 1)
    tokens = sample(filter_logits(logits, top_k=3), generator).view(20_000, 2)
    for column, probs in enumerate(([0, 4 / 9, 2 / 9, 3 / 9], [3 / 9, 2 / 9, 4 / 9, 0])):
        counts = tokens[:, column].bincount(minlength=4).tolist()
        assert counts[probs.index(0)] == 0
        # 13.8 is the 0.999 quantile of chi-squared with two degrees of freedom.
        assert chi_squared(counts, probs) < 13.8


def test_samples_follow_the_temperature(generator):
    # Temperature 1/2 squares 4 : 3 : 2 : 1. 16.3 is the 0.999 quantile with three degrees.
    logits = log([[0.4, 0.3, 0.2, 0.1]]).repeat(20_000, 1)
    tokens = sample(filter_logits(logits, temperature=0.5), generator)
    counts = tokens.bincount(minlength=4).tolist()
    assert chi_squared(counts, [16 / 30, 9 / 30, 4 / 30, 1 / 30]) < 16.3


def test_top_k_of_one_is_greedy(generator, dtype):
    logits = torch.randn(50, 7, generator=generator, dtype=dtype)
    tokens = sample(filter_logits(logits, top_k=1), generator)
    assert tokens.tolist() == [max(range(7), key=row.__getitem__) for row in logits.tolist()]


def test_extreme_logits_can_be_sampled(generator, dtype):
    logits = torch.tensor([[1e4, -1e4, -INF], [-1e4, -INF, 1e4]], dtype=dtype)
    filtered = filter_logits(logits, temperature=0.7, top_k=2, top_p=0.9)
    assert sample(filtered, generator).tolist() == [0, 2]


# Of 1/8, 0, 1/2, 0, 3/8 the cumulative ones are 1/8, 1/8, 5/8, 5/8, 1, all exact in binary.
GAPS = [0.125, 0.0, 0.5, 0.0, 0.375]
# The largest numbers below 1 that torch.rand draws in fp32 and float64, and fp32's next below 1.
LAST = [1 - 2**-24, 1 - 2**-53]


@pytest.mark.parametrize(
    ("uniform", "token"),
    [
        (0.0, 0),
        (0.1249, 0),
        (0.125, 2),
        (0.6249, 2),
        (0.625, 4),
        (0.99, 4),
        *((u, 4) for u in LAST),
    ],
)
def test_the_cumulative_distribution_is_inverted(uniform, token, dtype):
    # Where it jumps, the number belongs to the next token: [0, 1/8) is the first one's.
    wide = torch.tensor([uniform], dtype=torch.float64)
    assert draw_tokens(torch.tensor([GAPS], dtype=dtype), wide).tolist() == [token]


# A generator that rounds up to 1 does no harm either.
@pytest.mark.parametrize("uniform", [0.0, *LAST, 1.0])
def test_a_token_of_probability_0_is_never_drawn(uniform, generator, dtype):
    # Sums of a thousand rounded probabilities are not 1, and both ends of the row have none.
    probs = torch.rand(200, 1000, generator=generator, dtype=dtype)
    probs[:, :100] = 0
    probs[:, 900:] = 0
    probs[torch.rand(probs.shape, generator=generator) < 0.5] = 0
    probs /= probs.sum(dim=-1, keepdim=True)
    uniforms = torch.full((200,), uniform, dtype=torch.float64)
    tokens = draw_tokens(probs, uniforms)
    assert (probs.gather(1, tokens[:, None]) > 0).all()
    # And at the ends it is the first or the last that has any.
    possible = [row.nonzero().flatten().tolist() for row in probs]
    assert tokens.tolist() == [row[0 if uniform == 0 else -1] for row in possible]


def test_one_possible_token_is_drawn_whatever_the_number(dtype):
    probs = torch.eye(3, dtype=dtype).repeat_interleave(4, dim=0)
    uniforms = torch.tensor([0.0, 0.5, *LAST], dtype=torch.float64).repeat(3)
    assert draw_tokens(probs, uniforms).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_small_tail_is_reached():
    # In fp32 the running sum stays at 1 where the last 2^-26 are added; those numbers need float64.
    probs = torch.tensor([[1.0, 2.0**-26, 2.0**-26]])
    uniforms = torch.tensor([1 - 2.0**-40], dtype=torch.float64)
    assert draw_tokens(probs, uniforms).tolist() == [2]


def test_probabilities_need_not_sum_to_1(dtype):
    # 3 : 1; a quarter of the total begins at 3/4.
    probs = torch.tensor([[0.3, 0.1], [6.0, 2.0]], dtype=dtype)
    assert draw_tokens(probs, torch.tensor([0.74, 0.74])).tolist() == [0, 0]
    assert draw_tokens(probs, torch.tensor([0.76, 0.76])).tolist() == [1, 1]


def test_a_rows_token_does_not_depend_on_other_rows(generator, dtype):
    probs = torch.randn(64, 50, generator=generator, dtype=dtype).softmax(dim=-1)
    uniforms = torch.rand(64, generator=generator)
    tokens = draw_tokens(probs, uniforms)
    assert len(set(tokens.tolist())) > 20
    order = torch.randperm(64, generator=generator)
    assert torch.equal(draw_tokens(probs[order], uniforms[order]), tokens[order])
    alone = [draw_tokens(probs[i : i + 1], uniforms[i : i + 1]).item() for i in range(64)]
    assert alone == tokens.tolist()


def test_a_distribution_that_is_no_number_gives_some_token(dtype):
    probs = torch.tensor([[math.nan] * 3, [0.0, math.nan, 1.0], [0.0, 1.0, 0.0]], dtype=dtype)
    tokens = draw_tokens(probs, torch.tensor([0.0, 0.5, 0.5]))
    assert all(0 <= token < 3 for token in tokens.tolist())
    assert tokens[2] == 1


def test_filtered_logits_renormalise_to_the_kept_tokens(dtype):
    probs = filter_logits(log([[0.4, 0.3, 0.2, 0.1]], dtype), top_k=2).softmax(dim=-1)
    assert_close(probs, torch.tensor([[4 / 7, 3 / 7, 0, 0]], dtype=dtype))

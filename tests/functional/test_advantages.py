import math
import statistics

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_exp.functional.advantages import (
    best_of_groups,
    equal_groups,
    gae,
    group_normalized,
    leave_one_out,
    normalize_reward,
    terminal_rewards,
    zero_without_signal,
)

VALUES = [
    [0.5, -1.0, 2.0, 0.25],
    [1.5, 0.75, 9.0, 9.0],
    [-0.5, 9.0, 9.0, 9.0],
    [9.0, 9.0, 9.0, 9.0],
]
REWARDS = [
    [0.1, -0.2, 0.3, 2.0],
    [-0.4, 1.0, 9.0, 9.0],
    [-3.0, 9.0, 9.0, 9.0],
    [9.0, 9.0, 9.0, 9.0],
]
LENGTHS = [4, 2, 1, 0]


def ragged_mask() -> Tensor:
    return torch.tensor([[t < length for t in range(4)] for length in LENGTHS])


def ragged(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(VALUES, dtype=dtype), torch.tensor(REWARDS, dtype=dtype), ragged_mask()


def loop_gae(gamma: float, gae_lambda: float) -> list[list[float]]:
    """A_t = sum_k (gamma lambda)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}), row by row."""
    table = []
    for values, rewards, length in zip(VALUES, REWARDS, LENGTHS, strict=True):
        values = [*values[:length], 0.0]
        row = [0.0] * 4
        for t in range(length):
            row[t] = math.fsum(
                (gamma * gae_lambda) ** k
                * (rewards[t + k] + gamma * values[t + k + 1] - values[t + k])
                for k in range(length - t)
            )
        table.append(row)
    return table


def test_normalize_reward_golden(dtype):
    # Mean 2, unbiased std 1; the biased one would be sqrt(2/3).
    scores = torch.tensor([3.0, 1.0, 2.0], dtype=dtype)
    expected = torch.tensor([1.0, -1.0, 0.0], dtype=dtype) / (1 + 1e-5)
    assert_close(normalize_reward(scores), expected, rtol=1e-6, atol=1e-7)


def test_normalize_reward_adds_eps_to_the_standard_deviation():
    # Deviations of 1e-5 / sqrt(2), so std = 1e-5, plus eps 2e-5 (or 6e-5).
    scores = torch.tensor([0.0, math.sqrt(2) * 1e-5], dtype=torch.float64)
    expected = torch.tensor([-1.0, 1.0], dtype=torch.float64) / math.sqrt(2)
    assert_close(normalize_reward(scores), expected / 2)
    assert_close(normalize_reward(scores, eps=5e-5), expected / 6)


# The mean of seven times 1000.1 rounds to something else in float32; divided by a standard
# deviation that is as small, the difference would come out as 0.8.
@pytest.mark.parametrize("constant", [0.0, 0.1, -5.3, 1000.1])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_equal_scores_normalize_to_exactly_zero(constant, batch, dtype):
    normalized = normalize_reward(torch.full((batch,), constant, dtype=dtype))
    assert torch.equal(normalized, torch.zeros(batch, dtype=dtype))


def test_normalize_reward_permutes_with_the_batch_and_ignores_an_offset(dtype):
    scores = torch.tensor([0.5, -2.0, 4.0, 1.25], dtype=dtype)
    order = torch.tensor([2, 0, 3, 1])
    assert_close(normalize_reward(scores[order]), normalize_reward(scores)[order])
    assert_close(normalize_reward(scores + 64), normalize_reward(scores))


def test_terminal_rewards_golden(dtype):
    # Row 3 has no real token, so that its score goes nowhere, whatever it is.
    scores = torch.tensor([1.5, -2.0, 3.0, math.nan], dtype=dtype)
    expected = [[0, 0, 0, 1.5], [0, -2.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 0]]
    assert terminal_rewards(scores, ragged_mask()).tolist() == expected


def test_terminal_rewards_are_one_position_before_those_of_trl_on_padded_rows():
    # TRL writes at sequence_lengths_p1 = 3 here; ours at the last real token.
    mask = torch.tensor([[True, True, True, False]])
    assert terminal_rewards(torch.tensor([5.0]), mask).tolist() == [[0, 0, 5.0, 0]]


def test_terminal_rewards_permute_with_the_batch_and_ignore_extra_padding(dtype):
    scores = torch.tensor([1.5, -2.0, 3.0, 4.0], dtype=dtype)
    rewards, mask = terminal_rewards(scores, ragged_mask()), ragged_mask()
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(terminal_rewards(scores[order], mask[order]), rewards[order])
    wide = terminal_rewards(scores, torch.nn.functional.pad(mask, (0, 3)))
    assert torch.equal(wide, torch.nn.functional.pad(rewards, (0, 3)))


def test_gae_golden_of_torchtune(dtype):
    # torchtune tests/torchtune/rlhf/test_rewards.py, test_estimate_returns: returns = A + V.
    values = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=dtype)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=dtype)
    mask = torch.ones(1, 4, dtype=torch.bool)
    returns = gae(values, rewards, mask, gamma=0.9, gae_lambda=0.95) + values
    # Quoted to five decimals: 0.9^3 0.95^2 = 0.6579225.
    expected = torch.tensor([[0.65792, 0.7695, 0.9, 1.0]], dtype=dtype)
    assert_close(returns, expected, atol=6e-6, rtol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_gae_against_the_sum_of_its_definition(gamma, gae_lambda, dtype):
    values, rewards, mask = ragged(dtype)
    advantages = gae(values, rewards, mask, gamma=gamma, gae_lambda=gae_lambda)
    assert_close(advantages, torch.tensor(loop_gae(gamma, gae_lambda), dtype=dtype))


def test_lambda_zero_gives_exactly_the_one_step_advantages():
    # ARENA 2.4: V_{t+1} - V_t, and for the last token the score minus V.
    v = [0.3, -1.7, 2.9, 0.77]
    score = 1.1
    values = torch.tensor([v], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 0.0, 0.0, score]], dtype=torch.float64)
    expected = torch.tensor(
        [[v[1] - v[0], v[2] - v[1], v[3] - v[2], score - v[3]]], dtype=torch.float64
    )
    assert torch.equal(gae(values, rewards, mask, gamma=1.0, gae_lambda=0.0), expected)


def test_lambda_one_is_the_discounted_return_minus_the_value(dtype):
    values, rewards, mask = ragged(dtype)
    for gamma in (1.0, 0.9):
        expected = [
            [
                math.fsum(gamma ** (s - t) * row[s] for s in range(t, length)) - baseline[t]
                if t < length
                else 0.0
                for t in range(4)
            ]
            for row, baseline, length in zip(REWARDS, VALUES, LENGTHS, strict=True)
        ]
        advantages = gae(values, rewards, mask, gamma=gamma, gae_lambda=1.0)
        assert_close(advantages, torch.tensor(expected, dtype=dtype))


def test_values_that_predict_the_reward_leave_no_advantage(dtype):
    # A score of 2 at the end, V = 2 throughout.
    mask = ragged_mask()
    values = torch.full((4, 4), 2.0, dtype=dtype)
    rewards = torch.tensor(
        [[0, 0, 0, 2.0], [0, 2.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 0]], dtype=dtype
    )
    for gae_lambda in (0.0, 0.95, 1.0):
        advantages = gae(values, rewards, mask, gamma=1.0, gae_lambda=gae_lambda)
        assert torch.equal(advantages, torch.zeros(4, 4, dtype=dtype))


@pytest.mark.parametrize("garbage", [1e9, math.inf, -math.inf, math.nan])
def test_padding_reaches_neither_advantages_nor_gradients(garbage, dtype):
    weights = torch.arange(1.0, 17.0, dtype=dtype).view(4, 4)
    results = []
    for fill in (0.0, garbage):
        values, rewards, mask = ragged(dtype)
        values = values.masked_fill(~mask, fill).requires_grad_()
        rewards = rewards.masked_fill(~mask, fill).requires_grad_()
        advantages = gae(values, rewards, mask, gamma=0.9, gae_lambda=0.95)
        (advantages * weights).sum().backward()
        results.append((advantages.detach(), values.grad, rewards.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(dirty, clean)
        assert torch.isfinite(dirty).all()
        assert (dirty[~mask] == 0).all()


def test_gae_permutes_with_the_batch_and_ignores_extra_padding(dtype):
    values, rewards, mask = ragged(dtype)
    order = torch.tensor([2, 0, 3, 1])
    advantages = gae(values, rewards, mask, gamma=0.9, gae_lambda=0.95)
    permuted = gae(values[order], rewards[order], mask[order], gamma=0.9, gae_lambda=0.95)
    assert torch.equal(permuted, advantages[order])
    wide = gae(
        torch.nn.functional.pad(values, (0, 3), value=math.nan),
        torch.nn.functional.pad(rewards, (0, 3), value=math.nan),
        torch.nn.functional.pad(mask, (0, 3)),
        gamma=0.9,
        gae_lambda=0.95,
    )
    assert torch.equal(wide, torch.nn.functional.pad(advantages, (0, 3)))
    single = gae(values[1:2], rewards[1:2], mask[1:2], gamma=0.9, gae_lambda=0.95)
    assert torch.equal(single, advantages[1:2])


def test_gae_leaves_its_inputs_alone(dtype):
    values, rewards, mask = ragged(dtype)
    gae(values, rewards, mask, gamma=0.9, gae_lambda=0.95)
    assert values.tolist() == VALUES
    assert rewards.tolist() == torch.tensor(REWARDS, dtype=dtype).tolist()


@pytest.mark.parametrize(
    ("rewards", "has_signal"),
    [
        ([[0.0, 0.5], [0.5, 0.0]], False),  # the same in all, wherever it is received
        ([[0.0, 0.0], [0.0, 0.0]], False),
        ([[0.0, 0.5], [0.6, 0.0]], True),
        ([[0.1, 0.5], [0.0, 0.5]], True),  # a KL charged to a token
        ([[0.0, 0.5]], True),  # one completion is held against its values alone
        ([[0.0, 0.0]], False),
    ],
)
def test_advantages_are_zero_where_rewards_tell_no_completion_from_another(rewards, has_signal):
    table = torch.tensor(rewards)
    advantages = torch.arange(1.0, 1.0 + table.numel()).view_as(table)
    expected = advantages if has_signal else torch.zeros_like(table)
    assert torch.equal(zero_without_signal(advantages, table), expected)


GROUPS = torch.tensor([7, 3, 7, 3, 7, 5, 5])  # of three, two and two samples, in any order


def test_leave_one_out_by_hand():
    scores = torch.tensor([1.0, 4.0, 2.0, -2.0, 6.0, 0.5, 0.5])
    # 1 - (2 + 6) / 2, 4 - -2, 2 - (1 + 6) / 2, -2 - 4, 6 - (1 + 2) / 2, and equal ones
    expected = torch.tensor([-3.0, 6.0, -1.5, -6.0, 4.5, 0.0, 0.0])
    assert_close(leave_one_out(scores, GROUPS), expected)


def test_leave_one_out_of_a_permutation_is_permuted():
    scores, order = torch.randn(7), torch.randperm(7)
    permuted = leave_one_out(scores[order], GROUPS[order])
    assert_close(permuted, leave_one_out(scores, GROUPS)[order])


def test_leave_one_out_is_exactly_0_for_equal_scores():
    scores = torch.full((7,), 0.1)
    assert not leave_one_out(scores, torch.zeros(7, dtype=torch.long)).any()


def test_leave_one_out_needs_two_samples_of_each_prompt():
    with pytest.raises(ValueError, match="leave_one_out needs at least two samples"):
        leave_one_out(torch.ones(3), torch.tensor([0, 0, 1]))


SCORES = [1.0, 4.0, 2.0, -2.0, 6.0, 0.5, 0.5]


@pytest.mark.parametrize("scale", ["std", "none"])
def test_group_normalized_against_a_loop(scale, dtype):
    expected = []
    for score, group in zip(SCORES, GROUPS.tolist(), strict=True):
        members = [s for s, g in zip(SCORES, GROUPS.tolist(), strict=True) if g == group]
        deviation = statistics.stdev(members) + 1e-4 if scale == "std" else 1.0
        expected.append((score - statistics.mean(members)) / deviation)
    found = group_normalized(torch.tensor(SCORES, dtype=dtype), GROUPS, scale=scale)
    assert_close(found, torch.tensor(expected, dtype=dtype))


def test_two_samples_leave_one_out_is_their_difference_and_twice_the_centred_reward(dtype):
    scores = torch.tensor([0.3, -1.2, 2.0, 0.5], dtype=dtype)
    groups = torch.tensor([0, 0, 1, 1])
    found = leave_one_out(scores, groups)
    assert_close(found, torch.tensor([1.5, -1.5, 1.5, -1.5], dtype=dtype))
    assert_close(found, 2 * group_normalized(scores, groups, scale="none"))


def test_equal_scores_have_no_advantage_and_are_found():
    scores = torch.full((7,), 0.1)
    scores[0] = 0.2
    expected = [False, True, False, True, False, True, True]
    assert equal_groups(scores, GROUPS).tolist() == expected
    assert not group_normalized(scores, GROUPS)[expected].any()
    assert not group_normalized(torch.ones(1), torch.tensor([4])).any()


def test_the_best_of_groups_is_the_first_highest_where_scores_differ(dtype):
    scores = torch.tensor([1, 7, 2, -3, 2, 7, -1, 0], dtype=dtype)
    groups = torch.tensor([5, 2, 5, 0, 5, 2, 0, 9])
    assert best_of_groups(scores, groups).nonzero().flatten().tolist() == [2, 6]

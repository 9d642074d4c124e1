import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_exp.functional.masking import (
    masked_fill_zero,
    masked_mean,
    masked_rescale,
    masked_sum,
    masked_var,
    masked_whiten,
)

STATISTICS = [
    masked_fill_zero,
    masked_sum,
    masked_mean,
    masked_var,
    masked_whiten,
    masked_rescale,
]
every_statistic = pytest.mark.parametrize("statistic", STATISTICS, ids=lambda f: f.__name__)

# The row without a real position comes first: no statistic may start from what it holds.
RAGGED = [
    [9.0, 9.0, 9.0, 9.0],
    [0.5, -1.25, 3.0, 2.0],
    [4.0, 0.25, 9.0, 9.0],
    [-2.5, 9.0, 9.0, 9.0],
]
LENGTHS = [0, 4, 2, 1]


def ragged_mask() -> Tensor:
    return torch.tensor([[t < length for t in range(4)] for length in LENGTHS])


def loop_moments() -> tuple[float, float, float]:
    """Sum, mean and unbiased variance of the real positions of RAGGED, in plain Python."""
    real = [row[t] for row, length in zip(RAGGED, LENGTHS, strict=True) for t in range(length)]
    mean = math.fsum(real) / len(real)
    return math.fsum(real), mean, math.fsum((x - mean) ** 2 for x in real) / (len(real) - 1)


def value_and_gradient(statistic: Callable, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The statistic and the gradient of a sum of its entries with weights 1, 2, 3, ..."""
    x = x.clone().requires_grad_()
    value = statistic(x, mask)
    weights = torch.arange(1, value.numel() + 1, dtype=x.dtype).view_as(value)
    (value * weights).sum().backward()
    return value.detach(), x.grad


def test_golden_of_trl(dtype):
    # TRL tests/experimental/test_ppo_trainer.py, TestCore: what is masked in is [2, 3].
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype)
    mask = torch.tensor([False, True, True, False])
    half = math.sqrt(0.5)  # 0.5 / sqrt(var), var = 0.5 being unbiased
    assert_close(masked_sum(x, mask), torch.tensor(5.0, dtype=dtype))
    assert_close(masked_mean(x, mask), torch.tensor(2.5, dtype=dtype))
    assert_close(masked_var(x, mask), torch.tensor(0.5, dtype=dtype))
    assert_close(masked_whiten(x, mask), torch.tensor([0.0, -half, half, 0.0], dtype=dtype))
    assert_close(
        masked_rescale(x, mask), torch.tensor([0.0, 2.5 - half, 2.5 + half, 0.0], dtype=dtype)
    )
    assert torch.equal(masked_fill_zero(x, mask), torch.tensor([0.0, 2.0, 3.0, 0.0], dtype=dtype))


def test_rescale_golden_of_the_implementation_details_blog(dtype):
    # "The N Implementation Details of RLHF with PPO", reward whitening with shift_mean=False. It
    # prints two tables: with var 0.0750 (unbiased, torch's default and ours) this one; with
    # 0.0667 (biased, lm-human-preferences) one that begins 0.0508. Quoted to four decimals.
    rewards = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=dtype)
    expected = torch.tensor(
        [[0.1394, 0.5046, 0.8697], [1.2349, 1.6000, 1.9651], [2.3303, 2.6954, 3.0606]], dtype=dtype
    )
    mask = torch.ones(3, 3, dtype=torch.bool)
    assert_close(masked_rescale(rewards, mask), expected, atol=6e-5, rtol=0)
    assert_close(masked_var(rewards, mask), torch.tensor(0.075, dtype=dtype))


def test_ragged_rows_against_a_loop(dtype):
    total, mean, var = loop_moments()
    x, mask = torch.tensor(RAGGED, dtype=dtype), ragged_mask()
    whitened = [
        [(row[t] - mean) / math.sqrt(var + 1e-8) if t < length else 0.0 for t in range(4)]
        for row, length in zip(RAGGED, LENGTHS, strict=True)
    ]
    rescaled = [
        [whitened[b][t] + mean if t < length else 0.0 for t in range(4)]
        for b, length in enumerate(LENGTHS)
    ]
    assert_close(masked_sum(x, mask), torch.tensor(total, dtype=dtype))
    assert_close(masked_mean(x, mask), torch.tensor(mean, dtype=dtype))
    assert_close(masked_var(x, mask), torch.tensor(var, dtype=dtype))
    assert_close(masked_whiten(x, mask), torch.tensor(whitened, dtype=dtype))
    assert_close(masked_rescale(x, mask), torch.tensor(rescaled, dtype=dtype))


def test_eps_is_added_to_the_variance():
    # Deviations of 1e-4, so var = 2e-8; with eps = 1e-8 under the root 1e-4 / sqrt(3e-8).
    x = torch.tensor([-1e-4, 1e-4], dtype=torch.float64)
    mask = torch.ones(2, dtype=torch.bool)
    expected = torch.tensor([-1.0, 1.0], dtype=torch.float64) / math.sqrt(3.0)
    assert_close(masked_whiten(x, mask), expected)
    assert_close(masked_rescale(x, mask), expected)
    # eps = 6e-8 gives 1e-4 / sqrt(8e-8).
    expected = torch.tensor([-1.0, 1.0], dtype=torch.float64) / math.sqrt(8.0)
    assert_close(masked_whiten(x, mask, eps=6e-8), expected)
    assert_close(masked_rescale(x, mask, eps=6e-8), expected)


@every_statistic
@pytest.mark.parametrize("garbage", [1e9, math.inf, -math.inf, math.nan])
def test_padding_reaches_neither_value_nor_gradient(statistic, garbage, dtype):
    mask = ragged_mask()
    clean = torch.tensor(RAGGED, dtype=dtype)
    dirty = clean.masked_fill(~mask, garbage)
    value, gradient = value_and_gradient(statistic, dirty, mask)
    clean_value, clean_gradient = value_and_gradient(statistic, clean, mask)
    assert torch.equal(value, clean_value)
    assert torch.equal(gradient, clean_gradient)
    assert torch.isfinite(gradient).all()
    assert (gradient[~mask] == 0).all()
    if value.ndim:
        assert (value[~mask] == 0).all()


@every_statistic
def test_extra_padding_changes_nothing(statistic, dtype):
    mask, x = ragged_mask(), torch.tensor(RAGGED, dtype=dtype)
    wide_x = torch.nn.functional.pad(x, (0, 3), value=math.nan)
    wide_mask = torch.nn.functional.pad(mask, (0, 3))
    wide = statistic(wide_x, wide_mask)
    assert_close(wide[:, :4] if wide.ndim else wide, statistic(x, mask))


@every_statistic
def test_permuting_the_batch_permutes_the_output(statistic, dtype):
    mask, x = ragged_mask(), torch.tensor(RAGGED, dtype=dtype)
    order = torch.tensor([2, 0, 3, 1])
    value = statistic(x, mask)
    assert_close(statistic(x[order], mask[order]), value[order] if value.ndim else value)


@every_statistic
def test_without_a_real_position_value_and_gradient_are_zero(statistic, dtype):
    x = torch.full((2, 3), math.nan, dtype=dtype)
    value, gradient = value_and_gradient(statistic, x, torch.zeros(2, 3, dtype=torch.bool))
    assert (value == 0).all()
    assert (gradient == 0).all()


def test_one_real_position(dtype):
    x = torch.tensor([[7.0, math.nan]], dtype=dtype)
    mask = torch.tensor([[True, False]])
    assert masked_mean(x, mask) == 7
    assert masked_var(x, mask) == 0
    assert masked_whiten(x, mask).tolist() == [[0, 0]]
    assert masked_rescale(x, mask).tolist() == [[7, 0]]


# The mean of seven times 0.1, and of 1000.1, rounds to something else; divided by a standard
# deviation that is as small, the difference would come out as large as 0.5.
@pytest.mark.parametrize("constant", [0.1, -5.3, 1000.1])
def test_a_constant_whitens_to_exactly_zero(constant, dtype):
    x = torch.full((3, 5), constant, dtype=dtype)
    mask = torch.arange(5) < torch.tensor([[4], [2], [1]])
    assert masked_var(x, mask) == 0
    assert (masked_whiten(x, mask) == 0).all()
    assert_close(masked_rescale(x, mask), torch.where(mask, x, torch.zeros_like(x)))


@every_statistic
def test_gradcheck(statistic, generator):
    x = torch.randn(4, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: statistic(x, ragged_mask()), (x,))


@every_statistic
def test_nan_in_a_real_position_is_not_hidden(statistic, dtype):
    x = torch.tensor([[1.0, math.nan, 3.0]], dtype=dtype)
    value = statistic(x, torch.tensor([[True, True, False]]))
    assert value.isnan().any()

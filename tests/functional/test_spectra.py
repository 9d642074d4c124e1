"""Spectra of matrices whose singular values are known."""

import pytest
import torch

from rlhf_exp.functional.spectra import (
    alignment,
    effective_rank,
    energy_share,
    squared_singular_values,
)


def matrix_of(values: list[float], rows: int = 7, columns: int = 5) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0] for n in (rows, columns)
    )
    k = len(values)
    return left[:, :k] @ torch.diag(torch.tensor(values).double()) @ right[:, :k].T


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_values_are_those_of_a_decomposition(shape: tuple[int, int]) -> None:
    matrix = matrix_of([4.0, 2.0, 0.5], *shape)
    squares = squared_singular_values(matrix)
    assert squares.tolist() == pytest.approx([16, 4, 0.25, 0, 0], abs=1e-10)
    torch.testing.assert_close(squares, torch.linalg.svdvals(matrix).square(), atol=1e-10, rtol=0)


def test_the_rank_of_equal_values_is_their_number() -> None:
    for count in (1, 2, 5):
        squares = squared_singular_values(matrix_of([3.0] * count))
        assert effective_rank(squares) == pytest.approx(count, rel=1e-4)
    assert effective_rank(torch.zeros(3).double()) == 0


def test_the_rank_of_unequal_values_by_hand() -> None:
    # p = 3/4, 1/4: exp(-(3/4 log 3/4 + 1/4 log 1/4)) = 4 / 3^(3/4)
    squares = squared_singular_values(matrix_of([3.0, 1.0]))
    assert effective_rank(squares) == pytest.approx(4 / 3**0.75, rel=1e-4)


def test_energy_by_hand() -> None:
    squares = squared_singular_values(matrix_of([3.0, 1.0]))
    assert energy_share(squares, 1) == pytest.approx(0.9)
    assert energy_share(squares, 2) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_a_change_along_the_first_direction_is_aligned(shape: tuple[int, int]) -> None:
    base = matrix_of([5.0, 3.0, 2.0, 1.0], *shape)
    u, _, v = torch.linalg.svd(base)
    first = torch.outer(u[:, 0], v[0])
    assert alignment(first, base, 1) == pytest.approx((1, 1))
    second = torch.outer(u[:, 1], v[1])
    assert alignment(second, base, 1) == pytest.approx((0, 0), abs=1e-9)
    crossed = torch.outer(u[:, 0], v[3])
    assert alignment(crossed, base, 2) == pytest.approx((1, 0), abs=1e-9)


def test_a_random_change_is_aligned_by_chance() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(60, 40, generator=generator)
    found = [alignment(torch.randn(60, 40, generator=generator), base, 10) for _ in range(40)]
    rows, columns = (sum(side) / 40 for side in zip(*found, strict=True))
    assert rows == pytest.approx(10 / 60, abs=0.01)
    assert columns == pytest.approx(10 / 40, abs=0.01)

"""Spectra of matrices: effective rank, energy in the largest directions, alignment of two matrices.

All from the smaller of the two Gram matrices, in double precision: squares of singular values lose
half of the digits.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


def squared_singular_values(matrix: Float[Tensor, "row column"]) -> Float[Tensor, " value"]:
    """The squares of the singular values, largest first."""
    return torch.linalg.eigvalsh(_gram(matrix)).flip(0).clamp(min=0)


def effective_rank(squares: Float[Tensor, " value"]) -> float:
    """exp(-sum_i p_i log p_i) of p_i = s_i / sum_j s_j, from the squares of the singular values s:
    r equal ones give r, whatever their size. A zero matrix has 0. Source: Roy and Vetterli, "The
    effective rank: a measure of effective dimensionality" (2007), definition 1."""
    values = squares.sqrt()
    if not values.sum():
        return 0.0
    p = values / values.sum()
    return float(torch.special.entr(p).sum().exp())


def energy_share(squares: Float[Tensor, " value"], count: int) -> float:
    """The share of the squared Frobenius norm in the `count` largest singular directions."""
    return float(squares[:count].sum() / squares.sum())


class Alignment(NamedTuple):
    """The share of a matrix's squared norm in the span of another's `count` largest singular
    directions, on the side of the rows and of the columns. An isotropic random matrix has
    count / rows and count / columns on average."""

    rows: float
    columns: float


def alignment(
    change: Float[Tensor, "row column"], base: Float[Tensor, "row column"], count: int
) -> Alignment:
    """|U^T D|^2 / |D|^2 and |D V|^2 / |D|^2 of the change D and the first `count` left and right
    singular vectors U, V of the base. Both must not be 0, and the base's rank at least `count`."""
    change, base = change.double(), base.double()
    wide = base.shape[0] <= base.shape[1]
    _, vectors = torch.linalg.eigh(_gram(base))
    smaller = vectors[:, -count:]
    other = torch.nn.functional.normalize((base.T if wide else base) @ smaller, dim=0)
    left, right = (smaller, other) if wide else (other, smaller)
    energy = change.square().sum()
    return Alignment(
        rows=float((left.T @ change).square().sum() / energy),
        columns=float((change @ right).square().sum() / energy),
    )


def _gram(matrix: Tensor) -> Tensor:
    matrix = matrix.double()
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix

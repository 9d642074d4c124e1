"""Fixtures of the functional tests.

Comparisons take torch.testing's tolerances for the dtype (float32: 1e-5 absolute; float64: 1e-7),
a few roundings of sums of at most twenty terms of order 1.
"""

import pytest
import torch


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)

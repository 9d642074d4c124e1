"""Copies of a model's matrices and biases in a lower precision, for forward and backward passes.

Autocast converts every weight in every pass; the copies are converted once an optimizer step, in
memory that is reused. The weights themselves stay fp32: they are trained, saved and inspected.
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Swap(NamedTuple):
    module: nn.Module
    name: str
    weight: nn.Parameter
    copy: nn.Parameter


class WorkingWeights:
    """The copies. Each gradient of a copy is added at once to the gradient of its weight."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, excluded: Tensor) -> None:
        self._swaps: list[_Swap] = []
        self.active = False
        for module, name, weight in multiplied(model, excluded=excluded):
            copy = nn.Parameter(weight.detach().to(dtype), requires_grad=weight.requires_grad)
            if weight.requires_grad:
                copy.register_post_accumulate_grad_hook(partial(_add_gradient, weight))
            self._swaps.append(_Swap(module, name, weight, copy))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Refreshes the copies and puts them into the model within the block."""
        self.refresh()
        for swap in self._swaps:
            setattr(swap.module, swap.name, swap.copy)
        self.active = True
        try:
            yield
        finally:
            self.active = False
            for swap in self._swaps:
                setattr(swap.module, swap.name, swap.weight)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the weights again, after an optimizer step."""
        if self._swaps:
            torch._foreach_copy_(
                [swap.copy for swap in self._swaps], [swap.weight for swap in self._swaps]
            )

    def parameters(self) -> Iterator[nn.Parameter]:
        """The copies."""
        return (swap.copy for swap in self._swaps)


def _add_gradient(weight: nn.Parameter, copy: Tensor) -> None:
    """A hook that adds a copy's gradient to the weight's."""
    assert copy.grad is not None
    if weight.grad is None:
        weight.grad = copy.grad.to(weight.dtype)
    else:
        weight.grad += copy.grad
    copy.grad = None


def multiplied(
    model: nn.Module, *, excluded: Tensor
) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yields module, name and parameter for each fp32 weight and bias of a matrix product, which
    autocast converts. Skips modules whose weight is `excluded`."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module.weight is not excluded:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype == torch.float32:
                    yield module, name, parameter


def round_frozen(
    model: nn.Module, dtype: torch.dtype, *, excluded: Tensor, shared: Set[int]
) -> None:
    """Rounds the matrices of a frozen model to `dtype`, except weights whose id is in `shared`:
    another model uses their memory."""
    for module, name, weight in list(multiplied(model, excluded=excluded)):
        if id(weight) not in shared:
            setattr(module, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))

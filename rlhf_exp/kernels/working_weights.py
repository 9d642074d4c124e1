"""Copies of a model's matrices and biases in a lower precision, for passes to compute with.

Autocast converts every weight at every pass and back in the backward pass; here that is done once
an optimizer step, into memory that stays. The weights themselves stay fp32: they are what is
trained, saved and looked into.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Swap:
    module: nn.Module
    name: str
    weight: nn.Parameter
    copy: nn.Parameter


class WorkingWeights:
    """The copies. Their gradients are added to those of the weights as soon as there are any."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, besides: Tensor) -> None:
        self._swaps: list[_Swap] = []
        self.active = False
        for module, name, weight in multiplied(model, besides=besides):
            copy = nn.Parameter(weight.detach().to(dtype), requires_grad=weight.requires_grad)
            if weight.requires_grad:
                copy.register_post_accumulate_grad_hook(_Passing(weight))
            self._swaps.append(_Swap(module, name, weight, copy))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Puts the copies, brought up to date, into the model for the time of the block."""
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


class _Passing:
    """A hook that adds a copy's gradient to the weight's."""

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = weight

    def __call__(self, copy: Tensor) -> None:
        assert copy.grad is not None
        if self._weight.grad is None:
            self._weight.grad = copy.grad.to(self._weight.dtype)
        else:
            self._weight.grad += copy.grad
        copy.grad = None


def multiplied(
    model: nn.Module, *, besides: Tensor
) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The fp32 weights and biases of matrix products, with their modules and names there: what
    autocast converts. Modules whose weight is `besides` are left out."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module.weight is not besides:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype == torch.float32:
                    yield module, name, parameter


def round_frozen(
    model: nn.Module, dtype: torch.dtype, *, besides: Tensor, shared: set[int]
) -> None:
    """Replaces the matrices of a model that nothing trains by what autocast makes of them, except
    those whose id is in `shared`, whose memory is another model's."""
    for module, name, weight in list(multiplied(model, besides=besides)):
        if id(weight) not in shared:
            setattr(module, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))

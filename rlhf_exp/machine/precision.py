"""The precision of forward passes; weights, losses and updates are always fp32."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

Dtype = Literal["auto", "bf16", "fp32"]

# On a CPU bf16 makes no pass faster for models narrower than this.
NARROW = 192


def computes_bf16(device: torch.device) -> bool:
    """Returns True if the device computes bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def compute_dtype(dtype: Dtype, device: torch.device, *, width: int) -> torch.dtype:
    """The torch dtype of `dtype` on the device for a model of that width. auto is bf16 where the
    hardware computes it, and fp32 for models too narrow to gain from it on a CPU."""
    narrow = device.type == "cpu" and width < NARROW
    use_bf16 = _in_bf16(dtype, device) and not (dtype == "auto" and narrow)
    return torch.bfloat16 if use_bf16 else torch.float32


def autocast(dtype: Dtype, device: torch.device) -> AbstractContextManager[object]:
    """The context for forward passes in `dtype`; auto is bf16 where the hardware computes it."""
    if not _in_bf16(dtype, device):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def fp32_logits(head: nn.Module) -> Iterator[None]:
    """A context in which the output embedding computes in fp32 under autocast: near -100 bf16 has
    steps of one half, and a log-softmax of such logits is off by as much."""

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = type(head).forward(head, hidden.float())
        return logits

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _in_bf16(dtype: Dtype, device: torch.device) -> bool:
    return dtype == "bf16" or (dtype == "auto" and computes_bf16(device))

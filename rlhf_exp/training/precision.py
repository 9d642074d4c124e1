"""Which numbers a forward pass is computed in; weights, losses and updates are fp32 everywhere."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Dtype = Literal["auto", "bf16", "fp32"]


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16, so that it is not emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def autocast(dtype: Dtype, device: torch.device) -> AbstractContextManager[object]:
    """The context for forward passes in `dtype`; auto is bf16 where the device computes it. Below a
    width of about 256 fp32 is faster on a CPU."""
    if dtype == "fp32" or (dtype == "auto" and not computes_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)

"""Settings of the process that make a CPU compute faster, and change no result by more than
rounding."""

import ctypes
import platform

import torch

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def use_processor_well() -> None:
    """All of the below, for the whole process."""
    keep_freed_memory()
    use_fast_fp32_products()


def keep_freed_memory() -> bool:
    """Has the C library keep memory that tensors give back, as torch does on a GPU, instead of
    returning it to the system and clearing new pages for the next tensor; returns whether it can
    (glibc alone). Gradients and activations of a step then reuse those of the step before."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 2**30)) and bool(
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )


def use_fast_fp32_products() -> bool:
    """Has a CPU form fp32 matrix products with oneDNN in place of MKL if that is no less exact;
    returns whether it does.

    Torch offers oneDNN's products for fp32 only as permission to round to bf16. Processors without
    AMX make no use of that permission and are up to three times as fast as MKL is on AMD's: so it
    is tried, measured, and withdrawn where products become inexact.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch has no stub for it
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    if (a @ b - exact).abs().max() > 1e-6 * exact.abs().max():
        matmul.fp32_precision = before
        return False
    return True

"""Settings of the process that make a CPU faster and change results only by rounding."""

import ctypes
import platform

import torch

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def use_processor_well() -> None:
    """Applies all settings of this module to the process."""
    keep_freed_memory()
    use_fast_fp32_products()


def keep_freed_memory() -> bool:
    """Makes the C library keep the memory of freed tensors, as torch does on a GPU, so that a step
    reuses the memory of the step before and the system clears no new pages. Returns False without
    glibc, where nothing changes."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 2**30)) and bool(
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )


def use_fast_fp32_products() -> bool:
    """Makes torch compute fp32 matrix products with oneDNN instead of MKL if they stay exact;
    returns whether it does.

    Torch uses oneDNN for fp32 products only if it may round to bf16. Processors without AMX do not
    round then, and on AMD oneDNN is up to three times as fast as MKL. So this gives the permission,
    measures a product, and withdraws the permission if the product is inexact.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch has no stub for it
    previous_precision = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    if (a @ b - exact).abs().max() > 1e-6 * exact.abs().max():
        matmul.fp32_precision = previous_precision
        return False
    return True

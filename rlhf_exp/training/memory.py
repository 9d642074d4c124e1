"""Out of memory, in a few lines: what was being done, and which settings ask for less."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rlhf_exp.runs.context import TrainingError

# What torch's CPU allocator and cuBLAS say, which have no exception of their own.
SAID = ("DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or on a GPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SAID)


@contextmanager
def explaining_memory(doing: str, knobs: Sequence[str]) -> Iterator[None]:
    """Turns an allocation that fails within the block into a TrainingError that names what was
    being done ("phase 3: sampling") and the knobs."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # Around it are places in torch's source, and its own advice.
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". GPU")[0]
        reason = reason.rpartition("DefaultCPUAllocator: ")[2]
        raise TrainingError(
            f"{doing}: out of memory\n{reason[:300]}\nto need less: {'; '.join(knobs)}"
        ) from error

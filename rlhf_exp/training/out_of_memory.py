"""Short errors for running out of memory: what was being done, and which settings need less."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rlhf_exp.runs.context import TrainingError

# In the messages of torch's CPU allocator and of cuBLAS, which raise a plain RuntimeError.
MESSAGES = ("DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True if an allocation failed, on the CPU or on a GPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


@contextmanager
def explaining_memory(doing: str, knobs: Sequence[str]) -> Iterator[None]:
    """Turns a failed allocation within the block into a TrainingError that names what was being
    done ("phase 3: sampling") and the settings to lower."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # Without the locations in torch's source and torch's own advice.
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". GPU")[0]
        reason = reason.rpartition("DefaultCPUAllocator: ")[2]
        raise TrainingError(
            f"{doing}: out of memory\n{reason[:300]}\nto need less: {'; '.join(knobs)}"
        ) from error

"""The number of threads for an update on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# With fewer multiplications, waking a second thread takes longer than it saves (two cores).
WORTH_SHARING = 10_000_000


@contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """Runs the block on one thread if it has too few multiplications to share, else on all."""
    num_threads = torch.get_num_threads()
    if multiplications < WORTH_SHARING:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)

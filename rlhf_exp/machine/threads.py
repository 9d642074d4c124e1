"""How many threads share the work of an update on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Multiplications below which waking a second thread takes longer than the work that it takes over,
# measured on two cores.
WORTH_SHARING = 10_000_000


@contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """Within the block, one thread for updates of so few multiplications that more would slow them
    down, else as many as there are."""
    before = torch.get_num_threads()
    if multiplications < WORTH_SHARING:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

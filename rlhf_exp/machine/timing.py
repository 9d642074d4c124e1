"""Wall time of the parts of a run, in seconds."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch


class Stopwatch:
    """Adds up wall time by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times the block, including the GPU work that it queues."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        self.seconds[part] = self.seconds.get(part, 0.0) + elapsed

    def take(self) -> dict[str, float]:
        """Returns the seconds of each part and resets them."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def _process_age() -> float:
    try:  # in ticks since the boot; psutil's time of the boot is exact only to a second
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):  # not Linux
        return max(0.0, time.time() - psutil.Process().create_time())


# In time.monotonic(), which does not change when the system clock is set.
PROCESS_BEGAN = time.monotonic() - _process_age()


def process_age_s() -> float:
    """Seconds since the process was started, imports included."""
    return time.monotonic() - PROCESS_BEGAN

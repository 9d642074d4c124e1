"""Standard output and standard error whose writes never fail, even if nobody reads them."""

import io
import os
import sys
from typing import Any


class _Unbreakable(io.FileIO):
    """Writes to a descriptor. After a write fails (the reader of a pipe is gone, the disk is full,
    the terminal is closed), it drops that write and all later ones."""

    def write(self, data: Any) -> int:
        """Returns the number of bytes written, or dropped."""
        try:
            return super().write(data)
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return len(data)


def make_streams_unbreakable() -> None:
    """Replaces stdout and stderr by streams whose writes raise neither for a closed pipe nor for a
    character that the encoding lacks, which is written as an escape. If the process was started
    without a stream (`>&-`), its output is dropped."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # open() returns the lowest free descriptor, which is `number`; a sweep's jobs inherit.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
            setattr(sys, name, nowhere)
            continue
        if stream is not getattr(sys, f"__{name}__"):
            continue  # somebody captures it
        stream.flush()
        raw = _Unbreakable(number, "w", closefd=False)
        unbreakable = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, unbreakable)

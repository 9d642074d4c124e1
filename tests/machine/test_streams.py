"""Standard output that nobody reads, that is closed, or that lacks characters."""

import os
import subprocess
import sys

SCRIPT = r"""
import os, sys
from rich.console import Console
from rlhf_exp.machine.streams import make_streams_unbreakable
make_streams_unbreakable()
print("begins", flush=True)
{fault}
for _ in range(3):
    print("na\u00efve \ud800 \U0001f600", flush=True)
    Console().print("table \u2500")
    print("to standard error", file=sys.stderr)
os.write({beside}, b"reached the end")
"""


def run(fault: str = "", *, redirect: str = "", encoding: str = "utf-8") -> tuple[int, str, str]:
    """The exit code of the script in a shell, what it says, and what it says beside that."""
    read, beside = os.pipe()
    script = SCRIPT.format(fault=fault, beside=beside)
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, script],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        pass_fds=[beside],
        capture_output=True,
        text=True,
        errors="backslashreplace",
    )
    os.close(beside)
    with os.fdopen(read) as end:
        return done.returncode, done.stdout + done.stderr, end.read()


def test_a_pipe_that_nobody_reads_is_dropped():
    broken = "r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.dup2(w, 2)"
    assert run(broken) == (0, "begins\n", "reached the end")


def test_a_full_disk_behind_a_redirection_is_dropped():
    assert run(redirect=">/dev/full 2>&1") == (0, "", "reached the end")


def test_streams_that_were_closed_from_the_start_lead_nowhere():
    assert run(redirect=">&- 2>&-") == (0, "", "reached the end")
    assert run("assert open(os.devnull).fileno() > 2", redirect="<&- >&- 2>&-")[2]


def test_what_an_encoding_lacks_is_escaped():
    code, text, end = run(encoding="ascii")
    assert (code, end) == (0, "reached the end")
    assert text.count(r"na\xefve \ud800 \U0001f600") == 3
    assert text.count("to standard error") == 3
    code, text, end = run()  # a terminal that has them, but for the half of a pair
    assert (code, end) == (0, "reached the end")
    assert text.count("na\u00efve \\ud800 \U0001f600") == 3

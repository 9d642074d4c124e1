import os
import subprocess
import sys


def test_matplotlib_is_imported_whatever_backend_a_notebook_has_set():
    script = "import rlhf_exp.machine.environment, matplotlib; print(matplotlib.get_backend())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MPLBACKEND": "module://no_such_package.backend"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.lower()) == (0, "agg\n"), done.stderr

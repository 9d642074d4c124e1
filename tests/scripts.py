"""The scripts, called in this process as from a command line."""

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def call_script(
    name: str, *arguments: object, folder: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """`python scripts/NAME ARGUMENTS` in the folder, without the seconds that a process of its own
    takes to import what is imported here."""
    out, err = io.StringIO(), io.StringIO()
    command = [str(SCRIPTS / name), *map(str, arguments)]
    code: object = 0
    with pytest.MonkeyPatch.context() as patch:
        if folder is not None:
            patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        patch.setattr(sys, "argv", command)
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(command[0], run_name="__main__")
            except SystemExit as stop:
                code = stop.code or 0
    if isinstance(code, str):  # what sys.exit says itself
        err.write(f"{code}\n")
        code = 1
    assert isinstance(code, int)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

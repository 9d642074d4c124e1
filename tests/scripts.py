"""The scripts, called in this process as from a command line."""

import contextlib
import io
import logging
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_exp.tracking.progress import line_log, package_log

SCRIPTS = Path(__file__).parents[1] / "scripts"


@contextlib.contextmanager
def kept_logging() -> Iterator[None]:
    """Puts back what Hydra and the run do to the loggers, and closes their files."""
    loggers = [logging.getLogger(), package_log, line_log, logging.getLogger("rlhf_exp.file")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for handler in {h for logger in loggers for h in logger.handlers}:
            if isinstance(handler, logging.FileHandler):
                handler.close()
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def call_script(
    name: str, *arguments: object, folder: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """`python scripts/NAME ARGUMENTS` in the folder, without the seconds that a process of its own
    takes to import what is imported here."""
    out, err = io.StringIO(), io.StringIO()
    command = [str(SCRIPTS / name), *map(str, arguments)]
    code: object = 0
    with pytest.MonkeyPatch.context() as patch, kept_logging():
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

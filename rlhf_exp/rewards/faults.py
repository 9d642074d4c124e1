"""Exceptions of the user's code in a line that names the place to mend."""

from pathlib import Path
from traceback import extract_tb


def describe_fault(error: BaseException, *, caller: str, file: str | None = None) -> str:
    """The exception and " at FILE:LINE" of the innermost call below those in `caller`: in `file`,
    else outside of libraries, else of any. No line without such calls, and for a SyntaxError, whose
    message names it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")
    calls = [] if isinstance(error, SyntaxError) else list(extract_tb(error.__traceback__))
    while any(call.filename == caller for call in calls):
        calls = calls[1:]
    # Not a line in a library; W&B's is one too, which replaces sys.exit.
    outside = [call for call in calls if "site-packages" not in Path(call.filename).parts]
    lines = [call for call in calls if call.filename == file] or outside or calls
    return f"{text} at {lines[-1].filename}:{lines[-1].lineno}" if lines else text

"""How a run ends early: a message of a few lines, a status, an exit code.

It knows nothing of Hydra.
"""

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rlhf_exp.app.overrides import command
from rlhf_exp.machine.slurm import requeue
from rlhf_exp.runs.checkpoint import newest_phase
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.runs.status import Status, is_done, write_status
from rlhf_exp.runs.stopping import Interrupted, StopRequests
from rlhf_exp.settings import ConfigError
from rlhf_exp.tracking.progress import file_log

log = logging.getLogger(__name__)

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@contextmanager
def handle_exit(path: Path, *, sweep: bool, undo: Callable[[], None]) -> Iterator[StopRequests]:
    """Handles the end of the run in the block, which the yielded requests can stop. An early end is
    printed, becomes the run's status and raises SystemExit; a bug in a single run keeps its
    traceback. After a user's mistake in a single run, `undo` removes the files that it wrote. A
    run that is done stays done, even if showing or pushing its result fails."""
    file, folder = file_log(), RunFolder(path)
    end = partial(_end, folder)
    try:
        with StopRequests(abandon=lambda why: end("interrupted", why)).listening() as stop:
            yield stop
    except Interrupted as stopped:
        if is_done(path):
            log.warning("stopped by %s; the run is done, its figures may be missing", stopped)
            raise SystemExit(stopped.exit_code) from None
        log.error("stopped by %s; go on with: %s", stopped, command(f"resume={path}"))
        end("interrupted", str(stopped))
        if stopped.to_be_requeued:
            requeue()
        raise SystemExit(stopped.exit_code) from None
    except ConfigError as error:
        log.error("error: %s", bounded(str(error)))
        end("failed", str(error)) if sweep else undo()
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        log.error("interrupted; what was logged so far is in %s", path)
        end("interrupted", "KeyboardInterrupt")
        raise SystemExit(130) from None
    except TrainingError as error:
        hint = f"\nwhat was logged so far is in {path}{_how_to_go_on(path)}"
        log.error("error: %s%s", error, "" if is_done(path) else hint)
        file.exception("traceback")
        end("failed", str(error))
        raise SystemExit(error.exit_code) from None
    except SystemExit as error:
        file.exception("traceback")
        log.error(
            "error: sys.exit(%r) was called; the traceback is in %s/train.log", error.code, path
        )
        end("failed", f"sys.exit({error.code!r}) was called")
        raise SystemExit(error.code if isinstance(error.code, int) and error.code else 1) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            log.error("error: %s: %s: shorten it", error.filename or path, error.strerror)
            end("failed", str(error)) if sweep else undo()
            raise SystemExit(2) from None
        file.exception("traceback")
        if message := _disk_fault(error, path):
            log.error("error: %s; fix that, then: %s", message, command(f"resume={path}"))
            end("failed", message)
            raise SystemExit(1) from None
        end("failed", f"{type(error).__name__}: {error}")
        if sweep:
            raise SystemExit(1) from None
        raise


def _end(folder: RunFolder, status: Status, why: str) -> None:
    """Writes the status of a run that is not done."""
    if is_done(folder.path):
        return
    try:
        write_status(folder.path, status, why)
    except OSError as error:
        log.warning("%s/status.json cannot be written: %s", folder.path, error.strerror)


def _how_to_go_on(path: Path) -> str:
    """The command that resumes from the newest checkpoint, and its phase; empty without one."""
    newest = newest_phase(path)
    if newest is None:
        return ""
    return f"; once fixed, it goes on after step {newest}: {command(f'resume={path}')}"


def _disk_fault(error: Exception, path: Path) -> str | None:
    """A message about a disk that fails, or None for any other error. Rust libraries such as
    safetensors give the number of the error only in its text."""
    number, name = getattr(error, "errno", None), getattr(error, "filename", None)
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(match[1])
    if number not in DISK_FAULTS:
        return None
    return f"{name or path} cannot be written: {os.strerror(number)}"


def bounded(message: str, limit: int = 9) -> str:
    """The first lines of a message, and the number of lines left out."""
    lines = message.splitlines()
    if len(lines) <= limit:
        return message
    return "\n".join([*lines[: limit - 1], f"... and {len(lines) - limit + 1} more"])

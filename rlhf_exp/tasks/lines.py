"""Reads text files line by line, with clear errors for unreadable ones."""

from pathlib import Path

from rlhf_exp.runs.lfs import refuse_lfs_pointer
from rlhf_exp.settings import ConfigError


def read_lines(file: Path, *, field: str) -> list[str]:
    """The lines of a UTF-8 file, split at line feeds only. Raises ConfigError naming `field`, the
    key that sets the file, if it cannot be read."""
    try:
        refuse_lfs_pointer(file, field=field)
        return file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}: {file} is not UTF-8: save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {file} ({error.strerror})") from error

"""Text files line by line, and what may be wrong with them."""

from pathlib import Path

from rlhf_exp.runs.lfs import refuse_lfs_pointer
from rlhf_exp.settings import ConfigError


def read_lines(file: Path, *, field: str) -> list[str]:
    """The lines of a UTF-8 file, split at line feeds alone. Raises ConfigError naming `field`, the
    key that the file is set by, if it cannot be read."""
    try:
        refuse_lfs_pointer(file, field=field)
        return file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}: {file} is not UTF-8: save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {file} ({error.strerror})") from error

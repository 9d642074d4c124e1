"""Reads text files, with clear errors for unreadable ones."""

from pathlib import Path

from rlhf_exp.runs.lfs import refuse_lfs_pointer
from rlhf_exp.settings import ConfigError


def read_text(file: Path, *, field: str) -> str:
    """The contents of a UTF-8 file, without a byte order mark. Raises ConfigError naming `field`,
    the key that sets the file, if it cannot be read."""
    try:
        refuse_lfs_pointer(file, field=field)
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {file} ({error.strerror or error})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{field}: {file}, line {line} is not UTF-8; save the file as UTF-8"
        ) from error


def check_unicode(text: str, where: str) -> str:
    """The text. Raises ConfigError if it holds half of a surrogate pair, as JSON can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} is not Unicode text ({error.reason}); fix it") from error
    return text

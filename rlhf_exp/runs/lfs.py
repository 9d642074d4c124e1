"""Git LFS pointers: the small files that a clone without Git LFS has instead of large ones."""

from pathlib import Path

from rlhf_exp.settings import ConfigError

# <https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>
POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(file: Path, *, field: str) -> None:
    """Raises ConfigError if the file is a pointer, naming the field that sets the file, and
    OSError if it cannot be read."""
    with file.open("rb") as content:
        is_pointer = content.read(len(POINTER)) == POINTER
    if is_pointer:
        raise ConfigError(
            f"{field}: {file} is a Git LFS pointer, not the file itself: run `git lfs pull` in"
            f" {file.parent}"
        )

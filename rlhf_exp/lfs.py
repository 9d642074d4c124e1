"""Git LFS pointers: what a clone without Git LFS holds in place of large files."""

from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is a pointer <https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>."""
    with file.open("rb") as content:
        return content.read(len(POINTER)) == POINTER

"""A pointer of Git LFS is told from the file that it stands for."""

import pytest

from rlhf_exp.runs.lfs import refuse_lfs_pointer
from rlhf_exp.settings import ConfigError


def test_a_pointer_is_known_by_its_first_line(tmp_path):
    file = tmp_path / "file"
    for content in (b"\x10\0\0\0\0\0\0\0{}", b"version 2", b""):
        file.write_bytes(content)
        refuse_lfs_pointer(file, field="task.path")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    message = rf"^task\.path: {file} is a Git LFS pointer, .* run `git lfs pull` in {tmp_path}$"
    with pytest.raises(ConfigError, match=message):
        refuse_lfs_pointer(file, field="task.path")

"""A pointer of Git LFS is told from the file that it stands for."""

from rlhf_exp.lfs import is_lfs_pointer


def test_a_pointer_is_known_by_its_first_line(tmp_path):
    contents = {
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
        "weights": b"\x10\0\0\0\0\0\0\0{}",
        "text": b"version 2",
        "empty": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert [name for name in contents if is_lfs_pointer(tmp_path / name)] == ["pointer"]

import re
from pathlib import Path

import pytest

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.labelled_text import LabelledTextFile
from rlhf_exp.tasks.pairs import read_pairs
from rlhf_exp.tasks.tables import READERS, Source, read_table
from rlhf_exp.tasks.text_files import read_text


def test_lines_are_kept_as_they_are_and_a_mark_of_the_encoding_is_left_out(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes("\ufeffone\u2028still one\n\ntwo\n".encode())
    assert read_text(file, field="task.path") == "one\u2028still one\n\ntwo\n"


def test_what_cannot_be_read_is_refused_by_field_and_file(tmp_path: Path):
    file = tmp_path / "file"
    for reason in (
        "cannot read {} (No such file or directory)",
        "{}, line 1 is not UTF-8; save the",
    ):
        message = re.escape(f"task.x: {reason.format(file)}")
        with pytest.raises(ConfigError, match=f"^{message}"):
            read_text(file, field="task.x")
        file.write_bytes(b"\xff")


def read_as_table(file: Path) -> object:
    return read_table(Source(path=str(file)))


def read_as_pairs(file: Path) -> object:
    return [*read_pairs(file)]


def read_as_labelled_text(file: Path) -> object:
    return LabelledTextFile(path=str(file)).labelled_split()


@pytest.mark.parametrize(
    ("read", "ending"),
    [
        *((read_as_table, ending) for ending in READERS),
        (read_as_pairs, ".jsonl"),
        (read_as_pairs, ".parquet"),
        (read_as_labelled_text, ".tsv"),
        (lambda file: read_text(file, field="task.path"), ".txt"),
    ],
)
def test_a_pointer_of_git_lfs_is_not_read_as_data(tmp_path: Path, read, ending: str):
    file = tmp_path / f"data{ending}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    message = re.escape(f"task.path: {file} is a Git LFS pointer, not the file itself: run")
    with pytest.raises(ConfigError, match=rf"^{message} `git lfs pull` in {tmp_path}$"):
        read(file)

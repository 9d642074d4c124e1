import re
from pathlib import Path

import pytest

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.lines import read_lines


def test_lines_end_at_line_feeds_alone_and_a_mark_of_the_encoding_is_left_out(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes("\ufeffone\u2028still one\n\ntwo\n".encode())
    assert read_lines(file, field="task.path") == ["one\u2028still one", "", "two", ""]


def test_what_cannot_be_read_is_refused_by_field_and_file(tmp_path: Path):
    file = tmp_path / "file"
    for reason in ("cannot read {} (No such file or directory)", "{} is not UTF-8: save it"):
        message = re.escape(f"task.x: {reason.format(file)}")
        with pytest.raises(ConfigError, match=f"^{message}"):
            read_lines(file, field="task.x")
        file.write_bytes(b"\xff")

"""A file is the old one or the new one, never a part."""

import pytest

from rlhf_exp.runs.files import write_whole


def test_a_text_is_written_and_replaced_and_nothing_else_stays(tmp_path):
    path = tmp_path / "new" / "folder" / "status.json"
    for text in ("first \u00e9\n", "second"):
        write_whole(path, text)
        assert path.read_bytes() == text.encode()
    assert [file.name for file in path.parent.iterdir()] == ["status.json"]


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "status.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud800")
    assert path.read_text(encoding="utf-8") == "old"

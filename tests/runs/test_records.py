"""Records of a look inside: by phase, and without numbers that JSON does not have."""

import json
import math
from pathlib import Path

import pytest

from rlhf_exp.runs.records import record_folder, write_record


def test_a_record_is_written_below_the_run(tmp_path: Path) -> None:
    path = write_record(record_folder(tmp_path, None), "kl", {"a": [1.5, None]})
    assert path == tmp_path / "inside" / "kl.json"
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    assert record_folder(tmp_path, 4) == tmp_path / "inside" / "phase-000004"


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(tmp_path, "kl", {"a": math.nan})
    assert not (tmp_path / "kl.json").exists()

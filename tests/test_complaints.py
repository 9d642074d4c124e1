"""What Hydra and the disk refuse is said in a few lines; test_run.py has the rest, from the command
line."""

import errno
import os

import pytest

from rlhf_exp.complaints import explain
from rlhf_exp.run import CONF


def test_an_error_that_is_not_hydras_is_not_explained():
    assert explain(ValueError("mine"), CONF) is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_named_with_the_fix(number):
    message = explain(OSError(number, os.strerror(number), "/somewhere/outputs"), CONF)
    assert "/somewhere/outputs" in message
    assert os.strerror(number) in message
    assert "hydra.run.dir=" in message
    assert explain(OSError(errno.ECONNRESET, "reset"), CONF) is None

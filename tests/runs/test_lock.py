"""A folder belongs to one process at a time, and to none once that is dead."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_exp.runs.lock import is_locked, locked
from rlhf_exp.settings import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from rlhf_exp.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(float(sys.argv[2]))
print("released", flush=True)
"""


@contextmanager
def holder(path: Path, *, seconds: float = 60.0) -> Iterator[subprocess.Popen]:
    """Another process that has claimed the folder."""
    command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "claimed\n"
            yield process
        finally:
            process.kill()


def test_a_folder_is_made_and_claimed_until_the_block_ends(tmp_path):
    path = tmp_path / "new" / "run"
    assert not is_locked(path)
    assert not path.exists(), "to ask is not to write"
    with locked(path):
        assert is_locked(path)
    assert not is_locked(path)
    with locked(path):
        assert is_locked(path)


def test_a_claim_ends_with_an_error_too(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert not is_locked(tmp_path)


def test_a_second_claim_of_the_same_process_is_refused(tmp_path):
    with locked(tmp_path):
        with pytest.raises(ConfigError, match="another process is running in this folder"):
            locked(tmp_path).__enter__()
        assert is_locked(tmp_path), "a refused claim leaves the first one"


def test_another_process_is_refused_by_the_folders_name(tmp_path):
    with holder(tmp_path):
        assert is_locked(tmp_path)
        begin = time.monotonic()
        with pytest.raises(ConfigError, match=rf"{tmp_path}: another process is running"):
            locked(tmp_path).__enter__()
        assert time.monotonic() - begin < 5, "it does not wait for the other to end"
    with locked(tmp_path / "another folder"):
        pass


def test_a_folder_is_free_once_its_process_was_killed(tmp_path):
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        assert not is_locked(tmp_path)
        with locked(tmp_path):
            assert is_locked(tmp_path)


def test_asking_takes_the_folder_from_nobody(tmp_path):
    with holder(tmp_path, seconds=1.0) as process:
        for _ in range(20):
            assert is_locked(tmp_path)
        assert process.stdout.readline() == "released\n"
    assert not is_locked(tmp_path)


def test_a_lock_that_was_removed_claims_nothing(tmp_path):
    with locked(tmp_path):
        (tmp_path / ".lock").unlink()
        assert not is_locked(tmp_path)
    assert not (tmp_path / ".lock").exists()

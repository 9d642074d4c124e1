"""A job goes back into SLURM's queue, by SLURM's own command."""

import os

import pytest

from rlhf_exp.machine.slurm import requeue

SCONTROL = """#!/bin/sh
echo "$@" >> {record}
[ -e {fails} ] && echo "Invalid job id specified" >&2 && exit 1
exit 0
"""


@pytest.fixture
def record(tmp_path, monkeypatch):
    """What the scontrol of this test was asked."""
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    command, said = tmp_path / "scontrol", tmp_path / "said"
    command.write_text(SCONTROL.format(record=said, fails=tmp_path / "fails"))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return said


def test_outside_of_slurm_nothing_is_done(record):
    assert not requeue()
    assert not record.exists()


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}, "17_2"),
    ],
)
def test_a_job_and_one_of_an_array_are_queued_again(record, monkeypatch, variables, name):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert requeue()
    assert record.read_text() == f"requeue {name}\n"


def test_a_queue_that_refuses_or_is_not_there_is_told_of(record, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (tmp_path / "fails").touch()
    assert not requeue()
    assert "job 17 could not be queued again: Invalid job id specified" in caplog.text
    (tmp_path / "scontrol").unlink()
    assert not requeue()
    assert "No such file" in caplog.messages[-1]

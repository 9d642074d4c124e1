"""Snapshots are whole files, one for a phase, and go back with the run."""

import logging
from pathlib import Path

import pytest
import torch

from rlhf_exp.runs.snapshots import (
    read_snapshot,
    remove_snapshots,
    snapshot_path,
    snapshot_phases,
    write_snapshot,
)
from rlhf_exp.settings import ConfigError

WEIGHTS = {"a": torch.tensor([1.0, 1 + 2**-12]), "b.c": torch.arange(6.0).view(2, 3).T}


def test_what_is_written_is_read_and_nothing_else_stays(tmp_path: Path) -> None:
    for phase in (0, 8, 1_000_000):
        path = write_snapshot(tmp_path, phase, WEIGHTS, torch.float32)
        assert path == snapshot_path(tmp_path, phase)
    assert snapshot_phases(tmp_path) == [0, 8, 1_000_000]
    assert len([*(tmp_path / "snapshots").iterdir()]) == 3
    read = read_snapshot(tmp_path, 8)
    assert read.keys() == WEIGHTS.keys()
    assert all(torch.equal(read[name], weight) for name, weight in WEIGHTS.items())


def test_a_second_one_of_a_phase_replaces_the_first(tmp_path: Path) -> None:
    write_snapshot(tmp_path, 3, WEIGHTS, torch.float32)
    write_snapshot(tmp_path, 3, {"a": torch.zeros(1)}, torch.float32)
    assert snapshot_phases(tmp_path) == [3]
    assert read_snapshot(tmp_path, 3).keys() == {"a"}


def test_bf16_rounds(tmp_path: Path) -> None:
    write_snapshot(tmp_path, 0, WEIGHTS, torch.bfloat16)
    read = read_snapshot(tmp_path, 0)["a"]
    assert read.dtype == torch.bfloat16
    assert read.tolist() == [1, 1]


def test_later_phases_are_removed(tmp_path: Path) -> None:
    remove_snapshots(tmp_path, after=0)  # where there are none
    for phase in (0, 1, 2, 4):
        write_snapshot(tmp_path, phase, WEIGHTS, torch.float32)
    (tmp_path / "snapshots" / ".phase-000008.safetensors.partial").write_bytes(b"half")
    remove_snapshots(tmp_path, after=1)
    assert snapshot_phases(tmp_path) == [0, 1]
    assert len([*(tmp_path / "snapshots").iterdir()]) == 2


def test_a_half_written_file_does_not_count(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, 0, WEIGHTS, torch.float32)
    assert path is not None
    (path.parent / ".phase-000001.safetensors.partial").write_bytes(b"half")
    assert snapshot_phases(tmp_path) == [0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"phase-000000\.safetensors is not a whole snapshot"):
        read_snapshot(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"phase-000007\.safetensors is not a whole snapshot"):
        read_snapshot(tmp_path, 7)


def test_a_run_goes_on_without_a_snapshot_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "snapshots").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert write_snapshot(tmp_path, 4, WEIGHTS, torch.float32) is None
    assert "the snapshot of phase 4 could not be written" in caplog.text

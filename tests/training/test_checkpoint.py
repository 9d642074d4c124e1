"""Checkpoints: what is written comes back, and what was not finished is not there."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_exp.settings import ConfigError
from rlhf_exp.training.checkpoint import (
    has_checkpoint,
    newest_checkpoint,
    read_newest_checkpoint,
    write_checkpoint,
)

TENSORS = {
    "weights": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "low": torch.tensor([0.1, 2.0], dtype=torch.bfloat16),
    "step": torch.tensor(7.0),
    "generator": torch.Generator().manual_seed(3).get_state(),
    "pending": torch.arange(9)[4:],
    "empty": torch.empty(0, dtype=torch.long),
    "trained": torch.nn.Parameter(torch.ones(2)),
}
NUMBERS = {"phase": 3, "lr": 0.1 + 0.2, "betas": [0.9, 0.999], "none": None}


def folders(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def test_what_is_written_comes_back_bit_by_bit(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, TENSORS, NUMBERS)
    assert path == newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "phase-000003"
    tensors, numbers = read_newest_checkpoint(tmp_path)
    assert numbers == NUMBERS
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor), name
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert not tensors[name].requires_grad


def test_it_is_json_and_safetensors_and_nothing_pickled(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, TENSORS, NUMBERS)
    assert sorted(os.listdir(path)) == ["state.json", "state.safetensors"]
    assert json.loads((path / "state.json").read_text()) == NUMBERS
    assert load_file(path / "state.safetensors").keys() == TENSORS.keys()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_checkpoint(tmp_path, 4, TENSORS, {"object": object()})


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    for phase in (5, 10, 999_999, 1_000_000):
        write_checkpoint(tmp_path, phase, TENSORS, {"phase": phase})
        assert folders(tmp_path) == [f"phase-{phase:06d}"]
        assert read_newest_checkpoint(tmp_path).numbers == {"phase": phase}


def test_the_newest_is_that_of_the_latest_phase(tmp_path: Path) -> None:
    for phase in (999_999, 1_000_000, 12):
        write_checkpoint(tmp_path / str(phase), phase, TENSORS, {"phase": phase})
        (path,) = (tmp_path / str(phase) / "checkpoints").iterdir()
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        path.rename(tmp_path / "checkpoints" / path.name)
    (tmp_path / "checkpoints" / "phase-9999999.copy").mkdir()
    assert read_newest_checkpoint(tmp_path).numbers == {"phase": 1_000_000}


def test_a_phase_is_replaced_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, TENSORS, NUMBERS)
    (tmp_path / "checkpoints" / "phase-000003" / "more").touch()
    write_checkpoint(tmp_path, 3, {"other": torch.zeros(1)}, {"phase": 3})
    assert folders(tmp_path) == ["phase-000003"]
    assert os.listdir(tmp_path / "checkpoints" / "phase-000003").count("more") == 0
    assert read_newest_checkpoint(tmp_path).tensors.keys() == {"other"}


def test_one_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, TENSORS, NUMBERS)
    # The numbers come after the tensors, and cannot be written.
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path, 6, TENSORS, {"object": object()})
    assert len(folders(tmp_path)) == 2
    assert read_newest_checkpoint(tmp_path).numbers == NUMBERS
    (tmp_path / "checkpoints" / ".phase-000006.partial" / "rest").touch()
    path = write_checkpoint(tmp_path, 6, TENSORS, {"phase": 6})
    assert sorted(os.listdir(path)) == ["state.json", "state.safetensors"]
    assert folders(tmp_path) == ["phase-000006"]


def test_a_run_without_any(tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "nowhere"):
        for read in (read_newest_checkpoint, newest_checkpoint):
            with pytest.raises(ConfigError, match=f"^{run} has no checkpoint to go on from"):
                read(run)


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("kept", [0, 0.5, None], ids=["empty", "cut off", "gone"])
def test_one_that_cannot_be_read(file: str, kept: float | None, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, TENSORS, NUMBERS)
    content = (path / file).read_bytes()
    if kept is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ConfigError, match=f"^{path} cannot be read: "):
        read_newest_checkpoint(tmp_path)


def test_a_run_can_go_on_once_a_checkpoint_is_finished(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path / "nothing")
    assert not has_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / ".phase-000003.partial").mkdir(parents=True)
    (tmp_path / "checkpoints" / "phase-last").mkdir()
    assert not has_checkpoint(tmp_path)
    write_checkpoint(tmp_path, 4, TENSORS, NUMBERS)
    assert has_checkpoint(tmp_path)

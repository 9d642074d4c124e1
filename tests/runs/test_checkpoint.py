"""Checkpoints: what is written comes back, and what was not finished or is damaged is not taken."""

import errno
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rlhf_exp.runs import checkpoint as module
from rlhf_exp.runs.checkpoint import (
    CheckpointWriter,
    DamagedError,
    has_checkpoint,
    read_checkpoint,
    read_newest_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)
from rlhf_exp.settings import ConfigError
from tests.reliability import count_cases

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
FILES = ["manifest.json", "state.json", "state.safetensors"]


def folders(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def newest(run: Path) -> dict[str, Any]:
    found = read_newest_checkpoint(run)
    assert found is not None
    return found.numbers


def test_what_is_written_comes_back_bit_by_bit(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, TENSORS, NUMBERS)
    assert path == tmp_path / "checkpoints" / "phase-000003"
    tensors, numbers = read_checkpoint(path)
    assert numbers == NUMBERS == newest(tmp_path)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor), name
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert not tensors[name].requires_grad


def test_it_is_json_and_safetensors_and_nothing_pickled(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, TENSORS, NUMBERS)
    assert sorted(os.listdir(path)) == FILES
    assert json.loads((path / "state.json").read_text()) == NUMBERS
    assert load_file(path / "state.safetensors").keys() == TENSORS.keys()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_checkpoint(tmp_path, 4, TENSORS, {"object": object()})


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    kept = []
    for phase, score in ((1, None), (2, 0.7), (3, 0.9), (4, None), (5, 0.8), (6, float("nan"))):
        write_checkpoint(tmp_path, phase, TENSORS, {"phase": phase}, score=score)
        kept.append([int(name[-1]) for name in folders(tmp_path)])
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6]]
    assert newest(tmp_path) == {"phase": 6}
    # Of equal ones the first.
    write_checkpoint(tmp_path, 7, TENSORS, {"phase": 7}, score=0.9)
    write_checkpoint(tmp_path, 8, TENSORS, {"phase": 8})
    write_checkpoint(tmp_path, 9, TENSORS, {"phase": 9})
    assert [int(name[-1]) for name in folders(tmp_path)] == [3, 8, 9]


def test_the_newest_is_that_of_the_latest_phase(tmp_path: Path) -> None:
    for phase in (999_999, 1_000_000, 12):
        write_checkpoint(tmp_path / str(phase), phase, TENSORS, {"phase": phase})
        (path,) = (tmp_path / str(phase) / "checkpoints").iterdir()
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        path.rename(tmp_path / "checkpoints" / path.name)
    (tmp_path / "checkpoints" / "phase-9999999.copy").mkdir()
    assert newest(tmp_path) == {"phase": 1_000_000}


def test_a_phase_is_replaced_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, TENSORS, NUMBERS)
    (tmp_path / "checkpoints" / "phase-000003" / "more").touch()
    write_checkpoint(tmp_path, 3, {"other": torch.zeros(1)}, {"phase": 3})
    assert folders(tmp_path) == ["phase-000003"]
    assert sorted(os.listdir(tmp_path / "checkpoints" / "phase-000003")) == FILES


def test_one_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, TENSORS, NUMBERS)
    # The numbers come after the tensors, and cannot be written.
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path, 6, TENSORS, {"object": object()})
    assert folders(tmp_path) == ["phase-000003"]
    # Nor is what a killed process left.
    for name in (".phase-000006.partial", ".phase-000001.removed"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "rest").touch()
    assert newest(tmp_path) == NUMBERS
    write_checkpoint(tmp_path, 6, TENSORS, {"phase": 6})
    assert folders(tmp_path) == ["phase-000003", "phase-000006"]


def test_a_run_without_any(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path / "nothing")
    assert not has_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / ".phase-000003.partial").mkdir(parents=True)
    (tmp_path / "checkpoints" / "phase-last").mkdir()
    assert not has_checkpoint(tmp_path)
    assert read_newest_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 4, TENSORS, NUMBERS)
    assert has_checkpoint(tmp_path)
    remove_checkpoints(tmp_path)
    assert not has_checkpoint(tmp_path)
    remove_checkpoints(tmp_path)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = {"cut off": halve, "empty": lambda f: os.truncate(f, 0), "gone": os.unlink,
           "a bit flipped": flip}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_one_serves(
    file: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for phase in (3, 6):
        write_checkpoint(tmp_path, phase, TENSORS, {"phase": phase})
    path = tmp_path / "checkpoints" / "phase-000006"
    if (file, damage) == ("manifest.json", "a bit flipped"):  # of the checksum that it holds
        text = (path / file).read_text()
        at = text.index('"sha256": "') + 11
        (path / file).write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    else:
        DAMAGES[damage](path / file)
    with pytest.raises(DamagedError, match=r"\w"):
        read_checkpoint(path)
    assert newest(tmp_path) == {"phase": 3}
    assert f"{path} is damaged" in caplog.text
    if file != "manifest.json" and damage in ("cut off", "empty"):
        assert f"{file} has " in caplog.text
        assert " bytes instead of " in caplog.text
    assert "resuming from an earlier checkpoint" in caplog.text
    # It is set aside: it does not count as one of the newest.
    assert folders(tmp_path) == ["broken-phase-000006", "phase-000003"]
    for phase in (4, 5):
        write_checkpoint(tmp_path, phase, TENSORS, {"phase": phase})
    assert folders(tmp_path) == ["broken-phase-000006", "phase-000004", "phase-000005"]
    count_cases("damaged checkpoint files", 1)


def test_one_phase_may_be_damaged_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, TENSORS, {"phase": 3})
    for _ in range(3):
        flip(write_checkpoint(tmp_path, 6, TENSORS, {"phase": 6}) / "state.safetensors")
        assert newest(tmp_path) == {"phase": 3}
    assert folders(tmp_path) == [
        "broken-phase-000006", "broken-phase-000006-2", "broken-phase-000006-3", "phase-000003",
    ]  # fmt: skip


def test_it_is_said_if_all_are_damaged(tmp_path: Path) -> None:
    for phase in (3, 6):
        flip(write_checkpoint(tmp_path, phase, TENSORS, NUMBERS) / "state.safetensors")
    with pytest.raises(ConfigError, match=r"every checkpoint is damaged \(phase-000006: state"):
        read_newest_checkpoint(tmp_path)
    assert len(folders(tmp_path)) == 2


WHOLE: dict[str, bytes] = {}


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(data=st.data())
def test_no_bytes_in_its_files_are_taken_for_another_state(data: st.DataObject) -> None:
    """Arbitrary bytes, nested JSON and flipped or cut real files: the state itself, or damaged."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), 3, TENSORS, NUMBERS)
        file = path / data.draw(st.sampled_from(FILES))
        content = bytearray(file.read_bytes())
        kind = data.draw(st.sampled_from(["bytes", "json", "flip", "cut", "grow"]))
        if kind == "bytes":
            file.write_bytes(data.draw(st.binary(max_size=200)))
        elif kind == "json":
            leaves = st.none() | st.booleans() | st.floats() | st.text(max_size=5)
            nested = st.recursive(
                leaves, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(), c)
            )
            names = st.sampled_from(["files", "phase", "state.json", "state.safetensors", "x"])
            value = data.draw(st.dictionaries(names, nested, max_size=3) | nested)
            file.write_text(json.dumps(value))
        elif kind == "flip":
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(content)
        elif kind == "cut":
            file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        else:
            file.write_bytes(content + data.draw(st.binary(min_size=1, max_size=9)))
        try:
            tensors, numbers = read_checkpoint(path)
        except DamagedError:
            count_cases("bytes in checkpoints", 1)
            return
        assert numbers == NUMBERS
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    count_cases("bytes in checkpoints", 1)


def adam(size: int = 4) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    weight = torch.nn.Parameter(torch.zeros(size))
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    step(weight, optimizer)
    return weight, optimizer


def step(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    weight.grad = torch.ones_like(weight)
    optimizer.step()


def saved_tensors(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"weight": weight, **optimizer.state_dict()["state"][0]}


def test_the_next_step_waits_for_the_copy_and_for_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, optimizer = adam()
    writer = CheckpointWriter(tmp_path, optimizer)
    may_copy, may_write = threading.Event(), threading.Event()
    copy, write = module._copy, module.write_checkpoint
    monkeypatch.setattr(module, "_copy", lambda t: (may_copy.wait(9), copy(t))[1])
    monkeypatch.setattr(
        module, "write_checkpoint", lambda *a, **k: (may_write.wait(9), write(*a, **k))[1]
    )
    moving = torch.zeros(1)
    writer.save(1, {**saved_tensors(weight, optimizer), "moving": moving}, {"phase": 1})
    moving += 1  # the next rollout
    before = weight.detach().clone()
    threading.Timer(0.2, may_copy.set).start()
    began = time.monotonic()
    step(weight, optimizer)  # the next update
    assert time.monotonic() - began >= 0.15
    assert not has_checkpoint(tmp_path)
    step(weight, optimizer)
    may_write.set()
    assert writer.wait()
    tensors, _ = read_checkpoint(tmp_path / "checkpoints" / "phase-000001")
    assert torch.equal(tensors["weight"], before)
    assert not torch.equal(weight, before)
    assert tensors["step"] == 1
    assert tensors["moving"] == 0
    writer.close()


def test_saves_follow_each_other_and_closing_waits(tmp_path: Path) -> None:
    weight, optimizer = adam(100_000)
    writer = CheckpointWriter(tmp_path, optimizer)
    expected = []
    for phase in range(1, 4):
        writer.save(phase, saved_tensors(weight, optimizer), {"phase": phase})
        expected.append(weight.detach().clone())
        step(weight, optimizer)
    writer.close()
    assert folders(tmp_path) == ["phase-000002", "phase-000003"]
    for phase in (2, 3):
        tensors, _ = read_checkpoint(tmp_path / "checkpoints" / f"phase-{phase:06d}")
        assert torch.equal(tensors["weight"], expected[phase - 1])
    assert not optimizer._optimizer_step_pre_hooks


def test_one_that_cannot_be_written_is_warned_of_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, optimizer = adam()
    writer = CheckpointWriter(tmp_path, optimizer)
    writer.save(1, saved_tensors(weight, optimizer), {"phase": 1})
    assert writer.wait()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        writer.save(2, saved_tensors(weight, optimizer), {"phase": 2})
        step(weight, optimizer)
        assert not writer.wait()
    assert "could not be written ([Errno 28] No space left on device)" in caplog.text
    assert folders(tmp_path) == ["phase-000001"]
    writer.save(3, saved_tensors(weight, optimizer), {"phase": 3})
    writer.close()
    assert folders(tmp_path) == ["phase-000001", "phase-000003"]


def test_a_copy_is_bit_by_bit_of_any_type_and_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool):
        for shape in ((), (0,), (3,), (2, 5)):
            tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
            for source in (tensor, tensor.T if len(shape) == 2 else tensor):
                copied = module._copy(source)
                assert copied.dtype == dtype
                assert torch.equal(copied, source)
                assert copied.data_ptr() != source.data_ptr() or not source.numel()


def test_nothing_of_a_folder_elsewhere_is_touched(tmp_path: Path) -> None:
    """What is written in a manifest is compared, never opened."""
    path = write_checkpoint(tmp_path / "run", 3, TENSORS, NUMBERS)
    secret = tmp_path / "secret"
    secret.write_text("x")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../../secret"] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedError, match=r"does not list state\.json"):
        read_checkpoint(path)
    assert secret.read_text() == "x"


def test_killed_while_it_was_written_or_removed(tmp_path: Path) -> None:
    """Whatever names a crash leaves of the two renames, the newest whole one is found."""
    rng = random.Random(0)
    for case in range(20):
        run = tmp_path / str(case)
        for phase in (1, 2, 3):
            write_checkpoint(run, phase, TENSORS, {"phase": phase})
        root = run / "checkpoints"
        shutil.copytree(root / "phase-000003", root / ".phase-000004.partial")
        for file in (root / ".phase-000004.partial").iterdir():
            if rng.random() < 0.5:
                file.unlink()
        (root / "phase-000002").rename(root / ".phase-000002.removed")
        assert newest(run) == {"phase": 3}
        write_checkpoint(run, 4, TENSORS, {"phase": 4})
        assert folders(run) == ["phase-000003", "phase-000004"]
    count_cases("checkpoints half written or removed", 20)

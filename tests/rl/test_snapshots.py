"""Snapshots of a run: which phases, which weights, and what a resumed run does with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from rlhf_exp.models.finetune import Full, LastLayers, Lora
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rl.estimators import LeaveOneOut
from rlhf_exp.rl.snapshots import SnapshotPhases, due_phases, trained_entries
from rlhf_exp.runs.snapshots import read_snapshot, snapshot_path, snapshot_phases, write_snapshot
from rlhf_exp.stages.ppo import PPO

from ..stages.test_resume import Failing
from .toy import RAGGED, context, parts, ppo_with

PPO_ = ppo_with(
    total_phases=5, batch_size=8, num_minibatches=2, eval_every=5, eval_samples=4,
    checkpoint_every=2, histograms_every=None, dtype="fp32", snapshots="log",
)  # fmt: skip


def run(path: Path, ppo: PPO = PPO_, *, resume: bool = False, **replaced: Any) -> None:
    ppo.run(context(path, resume=resume), parts(**{"task": RAGGED, **replaced}))


@pytest.mark.parametrize(
    ("phases", "total", "expected"),
    [
        ("log", 100, [0, 1, 2, 4, 8, 16, 32, 64, 100]),
        ("log", 8, [0, 1, 2, 4, 8]),
        ("log", 1, [0, 1]),
        (25, 100, [0, 25, 50, 75, 100]),
        (3, 7, [0, 3, 6, 7]),
        ((2, 5), 7, [2, 5]),
        ((), 7, []),
    ],
)
def test_the_phases(phases: SnapshotPhases, total: int, expected: list[int]) -> None:
    assert due_phases(phases, total) == expected


@pytest.mark.parametrize(
    ("phases", "message"),
    [((3, 6), r"phase 6 is above total_phases=5"), (0, "at least 1"),
     ("every", "give log, a number"), ((-1,), "a list such as"), (True, "give log"),
     ([1.5], "give log")],
)  # fmt: skip
def test_other_phases_are_refused(phases: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ppo_with(PPO_, snapshots=phases)


LOO: dict[str, Any] = {"estimator": LeaveOneOut(), "samples_per_prompt": 4}
KINDS = {"full": Full(), "last_layers": LastLayers(num_layers_unfrozen=1), "lora": Lora(rank=2)}


@pytest.mark.parametrize("value_model", ["shared", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_hold_what_is_trained_alone(kind: str, value_model: Any, tmp_path: Path) -> None:
    model = Scratch(num_layers=2, d_model=16, num_heads=2, context_len=16, architecture="llama")
    ppo = ppo_with(PPO_, total_phases=2, value_model=value_model)
    run(tmp_path, ppo, model=model, finetune=KINDS[kind])
    assert snapshot_phases(tmp_path) == [0, 1, 2]
    first, last = read_snapshot(tmp_path, 0), read_snapshot(tmp_path, 2)
    assert first.keys() == last.keys()
    names = {name.removeprefix("language_model.") for name in last if name[0] == "l"}
    assert all(("lora_" in name) == (kind == "lora") for name in names)
    assert any(".layers.0." in name for name in names) == (kind != "last_layers")
    assert {"value_head.0.weight", "value_head.2.bias"} <= last.keys()
    assert any(name.startswith("value_trunk.") for name in last) == (value_model == "separate")
    assert sum(not torch.equal(first[name], last[name]) for name in last) > len(last) // 2
    if kind != "lora":
        saved = load_file(tmp_path / "model" / "model.safetensors")
        assert all(torch.equal(last[f"language_model.{name}"], saved[name]) for name in names)
    # What a dry run foresees, on a model without weights.
    tokenizer = RAGGED.build_tokenizer()
    with torch.device("meta"):
        skeleton = model._model(len(tokenizer)).eval()
    entries = trained_entries(
        skeleton, KINDS[kind].select, value_head=True, separate_values=value_model == "separate"
    )
    assert entries == sum(weight.numel() for weight in last.values())


def test_without_values_there_is_no_head(tmp_path: Path) -> None:
    run(tmp_path, ppo_with(PPO_, total_phases=1, **LOO))
    names = read_snapshot(tmp_path, 1)
    assert names
    assert not any(name.startswith("value_head") for name in names)


def test_an_average_is_kept_in_place_of_the_last_weights(tmp_path: Path) -> None:
    run(tmp_path, ppo_with(PPO_, total_phases=2, average_weights=0.9))
    last, saved = read_snapshot(tmp_path, 2), load_file(tmp_path / "model" / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(last[f"language_model.{name}"], saved[name])


def test_none_are_written_by_default(tmp_path: Path) -> None:
    run(tmp_path, ppo_with(PPO_, snapshots=None, total_phases=1))
    assert not (tmp_path / "snapshots").exists()


def files(path: Path) -> dict[int, bytes]:
    return {phase: snapshot_path(path, phase).read_bytes() for phase in snapshot_phases(path)}


def test_a_resumed_run_has_those_of_one_that_was_not_cut(tmp_path: Path) -> None:
    run(tmp_path / "whole", reward=Failing())
    with pytest.raises(KeyboardInterrupt):  # in phase 5; the checkpoint is of phase 4
        run(tmp_path / "cut", reward=Failing(at=6))
    assert snapshot_phases(tmp_path / "cut") == [0, 1, 2, 4]
    # Of a phase after the checkpoint, which went another way.
    write_snapshot(tmp_path / "cut", 5, {"stale": torch.zeros(1)}, torch.float32)
    write_snapshot(tmp_path / "cut", 7, {"stale": torch.zeros(1)}, torch.float32)
    run(tmp_path / "cut", reward=Failing(), resume=True)
    assert [*files(tmp_path / "whole")] == [0, 1, 2, 4, 5]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_run_that_begins_again_drops_those_of_the_earlier_attempt(tmp_path: Path) -> None:
    write_snapshot(tmp_path, 3, {"stale": torch.zeros(1)}, torch.float32)
    run(tmp_path, ppo_with(PPO_, total_phases=1, checkpoint_every=None), resume=True)
    assert snapshot_phases(tmp_path) == [0, 1]

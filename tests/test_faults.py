"""Runs that are killed, stopped, cut off from the disk: each goes on to the very numbers and
weights of one that was not. `make soak` tries many more moments than `make test`."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.training.files import sync_tree
from tests.faulty import (
    KillAtFileOperation,
    SignalAtPhase,
    begin_or_go_on,
    clock_backwards,
    run,
    said,
)
from tests.reliability import count_cases

SMALL = (
    "~experiment", "model.num_layers=1", "model.d_model=16", "sampler.gen_len=4",
    "stage.batch_size=8", "stage.num_minibatches=2", "stage.batches_per_learning_phase=1",
    "stage.eval_samples=8", "stage.eval_every=4", "stage.checkpoint_every=3",
    "stage.histograms_every=4", "schedule.warmup_steps=1", "logger=local", "device=cpu",
    "reward.character=e",
)  # fmt: skip
SHORT = (*SMALL, "stage.total_phases=6")
LONG = (*SMALL, "stage.total_phases=60", "stage.checkpoint_every=2")
KILLS, CRASHES = 40, 400  # of a long campaign; the latter is more than a short run has operations


def untimed(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def what_it_left(folder: Path) -> dict[str, Any]:
    """The result of a run, times and paths left out."""
    result = json.loads((folder / "result.json").read_text())
    return {
        **{name: untimed(folder / name) for name in ("metrics.jsonl", "samples.jsonl")},
        "histograms": (folder / "histograms.jsonl").read_bytes(),
        "result": {k: result[k] for k in ("before", "after")},
        "weights": {
            file.name: file.read_bytes()
            for file in (folder / "model").iterdir()
            if file.suffix == ".safetensors"
        },
    }


def assert_the_same(folder: Path, whole: Path, kind: str, number: int) -> None:
    """Counts the faults that a run went through, as survived if it is like the other one."""
    same = what_it_left(folder) == what_it_left(whole)
    count_cases(kind, number, lost=0 if same else number)
    assert same
    phases = [row["phase"] for row in untimed(folder / "metrics.jsonl") if "loss/total" in row]
    assert phases == list(range(1, len(phases) + 1)), "a gap or a repeat"
    assert json.loads((folder / "status.json").read_text())["status"] == "done"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "whole"
    assert run(folder, [*SHORT, f"hydra.run.dir={folder}"]) == 0, said(folder)
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "whole"
    assert run(folder, [*LONG, f"hydra.run.dir={folder}"]) == 0, said(folder)
    return folder


def kill_often(folder: Path, words: tuple[str, ...], *, kills: int, phases: int, seed: int) -> None:
    """Kills a run so many times at moments over its length, and lets it end."""
    rng = random.Random(seed)
    moments: list[int | None] = sorted(rng.choices(range(phases), k=kills - kills // 8))
    moments = [*[None] * (kills // 8), *moments]  # while it is started
    for phase in moments:
        delay = rng.uniform(0, 1.0) if phase is None else rng.uniform(0, 0.02)
        fault = SignalAtPhase(phase, delay_s=delay)
        assert begin_or_go_on(folder, words, fault=fault) in (-9, 2), said(folder)
    assert begin_or_go_on(folder, words) in (0, 2), said(folder)


@pytest.mark.parametrize("kills", [5, pytest.param(KILLS, marks=pytest.mark.soak)])
def test_killed_at_random_moments(kills: int, request: pytest.FixtureRequest, tmp_path) -> None:
    words, phases, name = (SHORT, 6, "short") if kills < KILLS else (LONG, 60, "long")
    whole = request.getfixturevalue(name)
    kill_often(tmp_path / "cut", words, kills=kills, phases=phases, seed=kills)
    assert_the_same(tmp_path / "cut", whole, "SIGKILL at a random moment", kills)


def test_killed_at_operations_on_files(short: Path, tmp_path: Path) -> None:
    """At some of all places where a file of the run is written, renamed, removed or flushed."""
    crash_at(range(7, 400, 60), short, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_killed_at_every_operation_on_files(short: Path, tmp_path: Path) -> None:
    crash_at(range(1, CRASHES), short, tmp_path)


def crash_at(numbers: range, whole: Path, tmp_path: Path) -> None:
    for number in numbers:
        folder = tmp_path / str(number)
        code = begin_or_go_on(folder, SHORT, fault=KillAtFileOperation(number))
        if code == 0:
            assert number > 50, "a run has more operations than that"
            return
        assert code == -9, said(folder)
        # Some of what was not flushed may be lost with the power.
        sync_tree(folder)
        assert begin_or_go_on(folder, SHORT) == 0, said(folder)
        assert_the_same(folder, whole, "SIGKILL at an operation on a file", 1)
        shutil.rmtree(folder)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_asked_to_stop(name: str, code: int, short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    assert begin_or_go_on(folder, SHORT, fault=SignalAtPhase(2, name=name)) == code, said(folder)
    status = json.loads((folder / "status.json").read_text())
    assert status == {"status": "interrupted", "error": name}
    text = said(folder)
    assert f"{name}: finishing this step and saving; once more ends at once" in text
    assert f"stopped by {name}; go on with: python train.py resume=" in text
    assert "Traceback" not in text
    newest = max(int(p.name[-6:]) for p in (folder / "checkpoints").glob("phase-*"))
    assert newest == untimed(folder / "metrics.jsonl")[-1]["phase"], "the finished phase is saved"
    assert begin_or_go_on(folder, SHORT) == 0, said(folder)
    assert_the_same(folder, short, "SIGTERM, SIGINT, SIGUSR1", 1)


def test_asked_twice_it_ends_at_once(short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    fault = SignalAtPhase(2, name="SIGINT", twice=True)
    assert begin_or_go_on(folder, (*SHORT, "stage.eval_samples=8"), fault=fault) == 130
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    assert begin_or_go_on(folder, SHORT) == 0, said(folder)
    assert_the_same(folder, short, "SIGTERM, SIGINT, SIGUSR1", 1)


def test_out_of_time_again_and_again(short: Path, tmp_path: Path) -> None:
    """One step is always made, so that a run of limits that are too short ends too."""
    folder, starts = tmp_path / "cut", 0
    while (code := begin_or_go_on(folder, (*SHORT, "max_minutes=1e-4"))) == 75:
        starts += 1
        assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    assert code == 0, said(folder)
    assert starts == 5
    assert_the_same(folder, short, "max_minutes over", starts)


def test_the_clock_goes_backwards(short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert begin_or_go_on(folder, SHORT, fault=clock_backwards) == 0, said(folder)
    seconds = json.loads((folder / "result.json").read_text())["seconds"]
    assert all(0 <= value < 600 for value in seconds.values())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [value for row in rows for name, value in row.items() if name.startswith("time/")]
    assert times
    assert min(times) >= 0
    assert_the_same(folder, short, "clock going backwards", 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip, os.unlink, lambda file: os.truncate(file, 9)], ids=["flip", "gone", "cut"]
)
def test_the_newest_checkpoint_is_damaged(damage: Any, short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    assert begin_or_go_on(folder, SHORT, fault=SignalAtPhase(5)) == -9
    found = sorted((folder / "checkpoints").glob("phase-*"))
    assert len(found) >= 2
    damage(found[-1] / "state.safetensors")
    assert begin_or_go_on(folder, SHORT) == 0, said(folder)
    assert f"{found[-1].name} is damaged" in said(folder)
    assert "going on from the one before" in said(folder)
    assert_the_same(folder, short, "damaged newest checkpoint", 1)

"""The script: records and pictures in the run's folder, whatever is asked of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.inside.parts import PARTS, SCHEMA
from tests.inside.tiny_runs import tiny_run
from tests.scripts import call_script

FEW = ("--samples", 96)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    more = "stage.eval_samples=96"
    first = tiny_run(root / "first", more)
    base = f"model.base_model={root / 'first_base'}"
    return first, tiny_run(root / "second", base, more, "seed=2")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_two_runs_are_looked_into_and_compared(runs: tuple[Path, Path]) -> None:
    done = call_script("inside.py", *runs, *FEW)
    assert done.returncode == 0, done.stderr
    for run in runs:
        files = {path.name for path in (run / "inside").iterdir()}
        assert files == {"kl.json", "kl.png", "weights.json", "weights.png", "overlap.json"}
        for name in (*PARTS, "overlap"):
            content = read(run / "inside" / f"{name}.json")
            assert content["schema"] == SCHEMA
            assert (content["part"], content["run"], content["phase"]) == (name, run.name, None)
            assert content["missing"] is None
        kl = read(run / "inside" / "kl.json")["record"]["own_samples"]["whole"]["kl"]
        assert f"own samples {kl['mean']:.3g} nats a token" in done.stdout
        # The run's own evaluation, of other samples.
        result = read(run / "result.json")["after"]["eval/kl"]
        assert kl["mean"] == pytest.approx(result, rel=0.3)
    [pair] = read(runs[0] / "inside" / "overlap.json")["record"]["pairs"]
    assert pair["runs"] == ["first", "second"]
    assert pair["largest"]["chance"] == pytest.approx(0.05, rel=0.1)
    assert f"{pair['bf16']['shared']:.1%} shared" in done.stdout


def test_a_part_of_a_phase(runs: tuple[Path, Path]) -> None:
    done = call_script("inside.py", runs[0], "--only", "weights", "--phase", 1)
    assert done.returncode == 0, done.stderr
    folder = runs[0] / "inside" / "phase-000001"
    assert sorted(path.name for path in folder.iterdir()) == ["weights.json", "weights.png"]
    content = read(folder / "weights.json")
    assert content["phase"] == 1
    whole = content["record"]["whole"]
    assert 0 < whole["relative_norm"] < 0.2
    assert f"relative norm {whole['relative_norm']:.2g}" in done.stdout


def test_a_part_that_a_run_does_not_allow_is_left_out(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    config = read(run / "resolved_config.json")
    config["task"] = None
    (run / "resolved_config.json").write_text(json.dumps(config))
    done = call_script("inside.py", run, *FEW)
    assert done.returncode == 0, done.stderr
    assert "weights: relative norm" in done.stdout
    record = read(run / "inside" / "kl.json")["record"]
    assert record["own_samples"] is record["neutral_texts"] is None
    assert "task" in record["missing"]["own_samples"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--phase", 9), "kept no weights of phase 9; it has snapshots of phases 0, 1, 2, 3"),
        (("--only", "kl,lens"), "--only=lens: the parts are kl, weights"),
        (("--samples", 0), "--samples=0: give at least 1"),
    ],
)
def test_mistakes_are_named(
    runs: tuple[Path, Path], words: tuple[object, ...], message: str
) -> None:
    done = call_script("inside.py", runs[0], *words)
    assert done.returncode != 0
    assert message in done.stderr


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    done = call_script("inside.py", tmp_path)
    assert done.returncode == 1
    assert "is not the folder of a run" in done.stderr

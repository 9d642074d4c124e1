"""The models of a run are those that it trained, whatever it trained and however it kept them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf_exp.inside import load_bridges, load_pair, load_policy, open_run, trajectory
from rlhf_exp.models import loading
from rlhf_exp.runs.paths import RESULT
from rlhf_exp.runs.snapshots import snapshot_path
from rlhf_exp.settings import ConfigError
from tests.inside.tiny_runs import tiny_run

KINDS = {
    "full": ("llama", []),
    "last_layers": ("gpt2", ["finetune=last_layers", "finetune.num_layers_unfrozen=1"]),
    "lora": ("gpt_neox", ["finetune=lora", "finetune.rank=2", "stage.average_weights=0.5"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    words = ["stage.checkpoint_every=3"]
    return {
        kind: tiny_run(root / kind, *words, *more, architecture=architecture)
        for kind, (architecture, more) in KINDS.items()
    }


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    weights, others = dict(one.named_parameters()), dict(other.named_parameters())
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def differ(one: nn.Module, other: nn.Module) -> set[str]:
    others = dict(other.named_parameters())
    return {name for name, w in one.named_parameters() if not torch.equal(w, others[name])}


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_snapshot_is_the_saved_model(kind: str, runs: dict[str, Path]) -> None:
    run = runs[kind]
    base, tuned = load_pair(run)
    saved = loading.load_policy(run)
    assert_equal(tuned, saved)
    assert_equal(load_policy(run, phase=3), saved)
    changed = differ(base, tuned)
    assert changed
    assert any("value_head" in name for name in changed)
    blocks = {name.split(".")[3] for name in changed if ".layers." in name or ".h." in name}
    assert blocks == ({"1"} if kind == "last_layers" else {"0", "1"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_the_model_that_the_run_began_with(kind: str, runs: dict[str, Path]) -> None:
    run = runs[kind]
    base = load_pair(run, phase=0).base
    own = loading.load_policy(run.with_name(f"{kind}_base"))
    assert_equal(base.language_model, own.language_model)
    assert_equal(load_policy(run, phase=0), base)  # the value head too


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_as_good_as_a_snapshot(kind: str, runs: dict[str, Path], tmp_path) -> None:
    copy = shutil.copytree(runs[kind], tmp_path / "copy")
    snapshot_path(copy, 3).unlink()
    assert_equal(load_policy(copy, phase=3), load_policy(runs[kind], phase=3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trajectory_goes_through_the_snapshots(kind: str, runs: dict[str, Path]) -> None:
    modules = set()
    phases = []
    for phase, pair in trajectory(runs[kind]):
        modules.update(map(id, pair))
        phases.append(phase)
        expected = load_pair(runs[kind], phase)
        assert_equal(pair.base, expected.base)
        assert_equal(pair.tuned, expected.tuned)
    assert phases == [0, 1, 2, 3]
    assert len(modules) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_bridges_compute_what_the_models_do(kind: str, runs: dict[str, Path]) -> None:
    pair, bridges = load_pair(runs[kind], 2), load_bridges(runs[kind], 2)
    assert bridges.base.tokenizer is bridges.tuned.tokenizer
    tokens = torch.tensor([[1, 5, 7, 9]])
    for policy, bridge in zip(pair, bridges, strict=True):
        torch.testing.assert_close(bridge(tokens), policy(tokens)[0], rtol=1e-4, atol=1e-4)
    settings = [{k: v for k, v in vars(b.cfg).items() if k != "tokenizer"} for b in bridges]
    assert repr(settings[0]) == repr(settings[1])


def test_snapshots_in_bf16_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run(tmp_path / "run", "stage.snapshot_dtype=bf16")
    policy = load_policy(run, phase=3)
    assert "the snapshot of phase 3 is bf16, whose rounding looks like a change" in caplog.text
    weights = dict(load_policy(run).named_parameters())
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, weights[name].bfloat16().float()), name


def test_a_separate_value_model_comes_back(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "stage.value_model=separate")
    last = load_policy(run, phase=3)
    assert last.value_trunk is not None
    assert differ(last.value_trunk, load_policy(run, phase=0).value_trunk)
    saved = load_policy(run)  # without the values, which need the trunk
    assert saved.value_head is None
    assert_equal(saved.language_model, last.language_model)


def test_a_model_from_scratch_is_drawn_again(tmp_path: Path) -> None:
    words = ("model=tiny", "model.num_layers=1", "model.d_model=16", "task=reviews")
    run = tiny_run(tmp_path / "run", *words, saved=False)
    base, tuned = load_pair(run)
    assert differ(base, tuned)
    assert_equal(base, load_policy(run, phase=0))


def test_phases_that_were_not_kept_are_told_from_those_that_were(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    message = r"kept no weights of phase 7; it has snapshots of phases 0, 1, 2, 3 and checkpoints"
    with pytest.raises(ConfigError, match=message):
        load_pair(runs["full"], phase=7)
    bare = shutil.copytree(runs["full"], tmp_path / "bare")
    for folder in ("snapshots", "checkpoints", "model"):
        shutil.rmtree(bare / folder)
    with pytest.raises(ConfigError, match=r"not done; it has neither .*stage\.snapshots=log"):
        load_policy(bare)
    with pytest.raises(ConfigError, match=r"has no snapshots: set stage\.snapshots=log"):
        next(trajectory(bare))


def test_a_base_that_has_changed_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs["full"], tmp_path / "copy")
    result = json.loads((copy / RESULT).read_text())
    (copy / RESULT).write_text(json.dumps({**result, "reference_sha256": "0" * 64}))
    with pytest.raises(ConfigError, match="its base model has changed since the run"):
        load_pair(copy)


def test_weights_of_another_model_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs["full"], tmp_path / "copy")
    shutil.copyfile(snapshot_path(runs["last_layers"], 1), snapshot_path(copy, 1))
    with pytest.raises(ConfigError, match="does not fit its base model"):
        load_policy(copy, phase=1)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        load_pair(tmp_path)
    (tmp_path / "resolved_config.json").write_text('{"model": {"base_model": "x"}, "seed": 1}')
    with pytest.raises(ConfigError, match="finetunes no language model"):
        load_pair(tmp_path)


def test_targets_outside_of_the_package_are_not_built(runs: dict[str, Path], tmp_path) -> None:
    copy = shutil.copytree(runs["full"], tmp_path / "copy")
    file = copy / "resolved_config.json"
    config = json.loads(file.read_text())
    config["model"]["_target_"] = "os.getcwd"
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="outside of rlhf_exp"):
        load_pair(copy)
    with pytest.raises(ConfigError, match="in call to target"):  # it is called
        load_pair(open_run(copy, allow_targets=["os"]))

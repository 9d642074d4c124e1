"""Which run goes on, and in what it may differ from what it was."""

import json
import os
from pathlib import Path

import pytest

from rlhf_exp.app.resume import (
    apply_changes,
    can_continue,
    check_changes,
    find_changes,
    find_run,
    is_run,
    recorded_words,
    with_recorded_words,
)
from rlhf_exp.runs.lock import locked
from rlhf_exp.settings import ConfigError

CONFIG = {
    "seed": 1,
    "device": "cpu",
    "logger": {"mode": "auto"},
    "stage": {"kl_coef": 0.2, "total_phases": 100, "checkpoint_every": 50, "top": None},
    "reward": {"_target_": "a.CharCount", "character": "."},
    "prepare": {},
}


def run(folder: Path, status: str | None, age: float = 0.0) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: 1\n")
    if status is not None:
        (folder / "status.json").write_text(status)
    for file in (folder / ".hydra" / "config.yaml", folder / "status.json"):
        if file.exists():
            os.utime(file, (1e9 - age, 1e9 - age))
    return folder


def said(status: str) -> str:
    return json.dumps({"status": status, "error": None})


def test_auto_is_the_newest_that_is_neither_done_nor_running(tmp_path):
    for name in ("none", "some"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"^resume=auto: no unfinished run below "):
        find_run("auto", tmp_path)
    run(tmp_path / "a" / "1", said("done"))
    with pytest.raises(ConfigError, match=r"^resume=auto: no unfinished run below "):
        find_run("auto", tmp_path)
    oldest = run(tmp_path / "a" / "2", said("interrupted"), age=30)
    assert find_run("auto", tmp_path) == oldest
    failed = run(tmp_path / "b" / "1", said("failed"), age=20)
    assert find_run("auto", tmp_path) == failed
    died = run(tmp_path / "b" / "2", None, age=10)  # before it could say anything
    assert find_run("auto", tmp_path) == died
    broken = run(tmp_path / "b" / "3", '{"sta', age=5)
    assert find_run("auto", tmp_path) == broken
    alive = run(tmp_path / "b" / "4", said("running"))
    with locked(alive):
        assert find_run("auto", tmp_path) == broken
    assert find_run("auto", tmp_path) == alive
    # Folders of artifacts, and jobs of sweeps, which are completed as sweeps are, are none.
    run(tmp_path / "b" / "sweeps" / "stamp" / "0_x", said("interrupted"), age=-9)
    assert find_run("auto", tmp_path) == alive


def test_a_run_that_is_named_must_be_one(tmp_path):
    with pytest.raises(ConfigError, match=r"no run's folder, which has \.hydra/config\.yaml$"):
        find_run(str(tmp_path), tmp_path)
    done = run(tmp_path / "a", said("done"))
    assert find_run(str(done), tmp_path) == done
    assert is_run(done)


def changed(**groups) -> list:
    return find_changes(CONFIG, {**CONFIG, **groups})


def test_changes_are_the_leaves_that_differ():
    assert changed() == []
    found = changed(
        seed=2,
        stage={**CONFIG["stage"], "kl_coef": None},
        reward={"_target_": "a.Length", "weight": 1},
    )
    assert [str(change) for change in found] == [
        "reward._target_: a.CharCount -> a.Length",
        "reward.character: . -> absent",
        "reward.weight: absent -> 1",
        "seed: 1 -> 2",
        "stage.kl_coef: 0.2 -> null",
    ]
    assert apply_changes(CONFIG, found) == {
        **CONFIG,
        "seed": 2,
        "stage": {**CONFIG["stage"], "kl_coef": None},
        "reward": {"_target_": "a.Length", "weight": 1},
    }
    assert CONFIG["seed"] == 1


def test_a_group_may_take_the_place_of_a_value_and_the_reverse():
    prepare = {"base": {"stage": {"epochs": 2}}}
    there = changed(prepare=prepare)
    assert apply_changes(CONFIG, there) == {**CONFIG, "prepare": prepare}
    back = find_changes({**CONFIG, "prepare": prepare}, CONFIG)
    assert apply_changes({**CONFIG, "prepare": prepare}, back)["prepare"].get("base", {}) in (
        {}, {"stage": {}},
    )  # fmt: skip


def test_a_change_is_refused_unless_it_is_allowed():
    found = changed(seed=2, stage={**CONFIG["stage"], "kl_coef": 3, "top": 5})
    with pytest.raises(ConfigError) as caught:
        check_changes(found, [], run=Path("outputs/x"))
    assert str(caught.value).splitlines() == [
        "resume=outputs/x uses that run's own configuration, which differs:",
        "  seed: 1 -> 2",
        "  stage.kl_coef: 0.2 -> 3",
        "  stage.top: null -> 5",
        "leave that out, or allow it with 'resume_with=[seed,stage.kl_coef,stage.top]'",
    ]
    with pytest.raises(ConfigError, match=r"'resume_with=\[seed\]'$"):
        check_changes(found, ["stage"], run=Path("x"))
    with pytest.raises(ConfigError, match=r"stage\.kl_coef,stage\.top\]'$"):
        check_changes(found, ["seed", "sta", "stage.k"], run=Path("x"))
    check_changes(found, ["stage", "seed"], run=Path("x"))
    check_changes(found, ["stage.kl_coef", "stage.top", "seed"], run=Path("x"))


def test_more_phases_and_what_concerns_no_results_are_always_allowed():
    stage = {**CONFIG["stage"], "total_phases": 200, "checkpoint_every": None}
    found = changed(stage=stage, logger={"mode": "offline"})
    check_changes(found, [], run=Path("x"))
    assert can_continue(found)
    assert not can_continue(changed(logger={}))
    fewer = changed(stage={**CONFIG["stage"], "total_phases": 50})
    assert not can_continue(fewer)
    for refused in (fewer, changed(device="cuda")):
        with pytest.raises(ConfigError, match="differs"):
            check_changes(refused, [], run=Path("x"))


def recorded(folder: Path, *words: str) -> Path:
    run(folder, said("interrupted"))
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps([*words]))
    return folder


def test_a_command_that_goes_on_has_the_runs_own_words_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("~experiment", "stage=sft", "stage.epochs=2", "reward=function", "reward.function=a",
             "resume=auto", "+reward.api_key=***", "seed=3")  # fmt: skip
    folder = recorded(Path("outputs/x/mine"), *words)
    assert recorded_words(folder) == [
        "~experiment", "stage=sft", "stage.epochs=2", "reward=function", "reward.function=a",
        "seed=3",
    ]  # fmt: skip
    known = ["~experiment", "stage=sft", "stage.epochs=2"]
    for resume in ("resume=auto", "resume=outputs/x/mine"):
        assert with_recorded_words([resume]) == [*recorded_words(folder), resume]
        given = [resume, "reward=length", "stage.log_every=5", "seed=4"]
        assert with_recorded_words(given) == [*known, *given]
    named = ["hydra.run.dir=outputs/x/mine", "resume=auto"]
    assert with_recorded_words(named) == [*recorded_words(folder), *named]
    assert with_recorded_words([*named, "stage=ppo"]) == [
        "~experiment", "reward=function", "reward.function=a", "seed=3", *named, "stage=ppo",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["seed=1"], ["resume=nowhere"], ["-m", "resume=outputs/x/mine"], ["resume=null"],
        ["hydra.run.dir=outputs/x/new", "resume=auto"],
    ],
)  # fmt: skip
def test_any_other_command_is_left_as_it_is(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    recorded(Path("outputs/x/mine"), "seed=3")
    assert with_recorded_words(words) == words


@pytest.mark.parametrize("text", ["{}", "[1]", "[", "\x00"])
def test_words_that_cannot_be_read_are_refused(tmp_path, text):
    folder = recorded(tmp_path / "run")
    (folder / ".hydra" / "overrides.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"overrides\.yaml cannot be read"):
        recorded_words(folder)


def test_what_lets_a_run_that_is_done_go_on():
    for key, after in (
        ("total_phases", 200),
        ("epochs", 3),
        ("guards", {"max_kl_sum": 5.0}),
        ("guards", {"max_kl_sum": None}),
    ):
        before = {**CONFIG["stage"], "epochs": 2, "guards": {"max_kl_sum": 1.0}}
        found = find_changes({"stage": before}, {"stage": {**before, key: after}})
        assert can_continue(found)
    for key, after in (("total_phases", 50), ("epochs", 1), ("kl_coef", 5.0)):
        found = find_changes({"stage": before}, {"stage": {**before, key: after}})
        assert not can_continue(found)

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.app.steps import Prepared, Step, classes_of, prepare, read_steps, substitute
from rlhf_exp.rewards.keyword import Keyword
from rlhf_exp.rewards.weighted_sum import Term, WeightedSum
from rlhf_exp.runs.context import Context
from rlhf_exp.settings import ConfigError, is_reference
from rlhf_exp.stages.protocol import Stage, StageResult


@dataclass(frozen=True)
class Lines:
    """A task that reads a file."""

    path: str

    def fingerprint(self) -> str:
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()


@dataclass(frozen=True)
class MadeLines(Lines):
    """A task that reads the file `lines` of a folder, which an earlier step may make."""

    def __post_init__(self) -> None:
        if not is_reference(self.path):
            object.__setattr__(self, "path", f"{self.path}/lines")

    def fingerprint(self) -> str:
        return "" if is_reference(self.path) else super().fingerprint()


@dataclass(frozen=True)
class Saved:
    """A model that an earlier step made."""

    base_model: str


@dataclass(frozen=True, kw_only=True)
class LinesParts:
    """A task alone."""

    task: Lines


@dataclass(frozen=True, kw_only=True)
class SavedParts:
    """A model alone."""

    model: Saved


@dataclass(frozen=True)
class Write(Stage[LinesParts]):
    """A stage that writes a text, the task's file and the seed as its model."""

    Parts = LinesParts

    text: str = "text"
    hf_token: str = ""

    def check(self, parts: LinesParts) -> list[str]:
        return ["stage.text is empty"] if not self.text else []

    def metric_names(self, parts: LinesParts) -> tuple[str, ...]:
        return ("heldout/loss",)

    def run(self, context: Context, parts: LinesParts) -> StageResult:
        model = context.folder.path / "model"
        model.mkdir()
        lines = Path(parts.task.path).read_text()
        (model / "out").write_text(f"{self.text} {lines} {context.seed} {context.device}")
        context.folder.log(1, {"heldout/loss": 0.5})
        return StageResult(after={"heldout/loss": 0.5}, seconds={})


@dataclass(frozen=True)
class Count(Stage[LinesParts]):
    """A stage that has something to say of its task's lines once they are read, and draws them."""

    Parts = LinesParts

    at_least: int = 1

    def check_texts(self, parts: LinesParts) -> list[str]:
        count = len(Path(parts.task.path).read_text().splitlines())
        return [f"stage.at_least={self.at_least}: {count} lines"] if count < self.at_least else []

    def metric_names(self, parts: LinesParts) -> tuple[str, ...]:
        return ()

    def run(self, context: Context, parts: LinesParts) -> StageResult:
        (context.folder.path / "lines").write_text("a line\n")
        (context.folder.path / "lines.png").write_bytes(b"picture of " + parts.task.path.encode())
        return StageResult(after={}, seconds={})


@dataclass(frozen=True)
class Extend(Stage[SavedParts]):
    """A stage that reads another's model and adds to it."""

    Parts = SavedParts

    suffix: str = "!"

    def metric_names(self, parts: SavedParts) -> tuple[str, ...]:
        return ()

    def run(self, context: Context, parts: SavedParts) -> StageResult:
        (context.folder.path / "model").mkdir()
        text = (Path(parts.model.base_model) / "model" / "out").read_text()
        (context.folder.path / "model" / "out").write_text(text + self.suffix)
        return StageResult(after={}, seconds={})


@dataclass(frozen=True)
class Wander(Write):
    """A stage whose reward changes the folder of the process before the stage writes its model."""

    to: str = ""

    def run(self, context: Context, parts: LinesParts) -> StageResult:
        os.chdir(self.to)
        lines = Lines(path=str(Path(self.to).parent / "lines"))
        return super().run(context, LinesParts(task=lines))


KINDS = {
    "wander": Wander,
    "write": Write,
    "extend": Extend,
    "count": Count,
    "made": MadeLines,
    "lines": Lines,
    "saved": Saved,
}


def build(config: Mapping[str, Any], path: str, problems: list[str]) -> Any:
    """What stands for Hydra: the class under `kind` with the other keys."""
    try:
        return KINDS[config["kind"]](**{k: v for k, v in config.items() if k != "kind"})
    except TypeError as error:
        problems.append(f"{path}: {error}")
        return None


@pytest.fixture
def steps(tmp_path) -> dict[str, Any]:
    """A configuration of two steps, the second on the first, and a run on both."""
    (tmp_path / "lines").write_text("lines")
    return {
        "prepare": {
            "base": {
                "stage": {"kind": "write", "text": "text"},
                "task": {"kind": "lines", "path": str(tmp_path / "lines")},
            },
            "more": {
                "stage": {"kind": "extend", "suffix": "!"},
                "model": {"kind": "saved", "base_model": "artifact:base"},
            },
        },
        "stage": {"kind": "extend"},
        "model": {"kind": "saved", "base_model": "artifact:more"},
        "reward": {"kind": "saved", "base_model": "artifact:base"},
    }


def made(config: Mapping[str, Any], root: Path, seed: int = 0) -> dict[str, Path]:
    """The model directories of the steps of `prepare`, by name."""
    found = prepare(
        read_steps(config)[:-1],
        build,
        root=root,
        seed=seed,
        device=torch.device("cpu"),
    )
    assert found.results.keys() == found.folders.keys()
    assert {f"prepare.{name}" for name in found.folders} == found.seconds.keys()
    return {name: Path(path) / "model" for name, path in found.folders.items()}


def keys(config: Mapping[str, Any], root: Path, seed: int = 0) -> tuple[str, ...]:
    return tuple(path.parent.name for path in made(config, root, seed).values())


def test_steps_are_read_in_order_the_runs_own_last(steps):
    read = read_steps(steps)
    assert [(step.name, step.path) for step in read] == [
        ("base", "prepare.base."),
        ("more", "prepare.more."),
        ("run", ""),
    ]
    assert read[0].config == steps["prepare"]["base"]
    assert {k: v for k, v in read[2].config.items() if v is not None} == {
        name: steps[name] for name in ("stage", "model", "reward")
    }


def test_a_run_on_nothing_is_one_step():
    assert [step.name for step in read_steps({"prepare": {}, "stage": {}})] == ["run"]


@pytest.mark.parametrize(
    ("where", "name", "message"),
    [
        (("model",), "bsae", r"model\.base_model=artifact:bsae: no earlier .*: base, more$"),
        (("prepare", "more", "model"), "more", r"prepare\.more\.model\.base_model=.*: base$"),
        (("prepare", "base", "task"), "more", r"prepare\.base\.task\.path=.*: none$"),
    ],
    ids=["unknown", "itself", "later"],
)
def test_a_reference_to_what_no_earlier_step_makes_is_refused(steps, where, name, message):
    part = steps
    for key in where:
        part = part[key]
    part["path" if where[-1] == "task" else "base_model"] = f"artifact:{name}"
    with pytest.raises(ConfigError, match=message):
        read_steps(steps)


def test_a_key_that_a_step_does_not_have_is_refused(steps):
    steps["prepare"]["base"]["taks"] = {}
    with pytest.raises(ConfigError, match=r"prepare\.base\.taks: no such key; use: stage, task"):
        read_steps(steps)


def test_references_are_replaced_wherever_they_stand():
    config = {"a": "artifact:x", "b": {"c": {"d": "artifact:y"}, "e": "an artifact:x"}, "f": [1]}
    assert substitute(config, {"x": "/1", "y": "/2"}) == {
        "a": "/1",
        "b": {"c": {"d": "/2"}, "e": "an artifact:x"},
        "f": [1],
    }
    assert config["a"] == "artifact:x"
    step = Step(name="run", path="", config={"model": {"base_model": "artifact:x"}})
    assert step.resolved({"x": "/1"}).config == {"model": {"base_model": "/1"}}


def test_a_stage_gets_the_parts_that_it_takes(steps):
    stage, parts = read_steps(steps)[2].build(build)
    assert stage == Extend()
    assert parts == SavedParts(model=Saved("artifact:more"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, "prepare.base.task: is required here; choose one: task=..."),
        ({"task": {}}, "prepare.base.task: is required here; choose one: task=..."),
        ({"stage": {"kind": "write", "text": ""}}, "prepare.base.stage.text is empty"),
        (
            {"stage": {"kind": "extend"}, "model": {"kind": "lines", "path": "x"}},
            "prepare.base.model: Lines is not for this stage, Extend, which takes a Saved;"
            " choose another model=...",
        ),
    ],
)
def test_what_is_wrong_with_a_step_is_said_with_its_path(steps, change, message):
    steps["prepare"]["base"] |= change
    with pytest.raises(ConfigError) as caught:
        read_steps(steps)[0].build(build)
    assert str(caught.value) == message


def test_what_is_no_stage_is_refused(steps):
    steps["prepare"]["base"]["stage"] = {"kind": "saved", "base_model": "x"}
    with pytest.raises(ConfigError, match=r"^prepare\.base\.stage: Saved is no stage; choose one"):
        read_steps(steps)[0].build(build)


def test_all_bad_parts_of_a_step_are_named_at_once(steps):
    steps["prepare"]["base"]["stage"]["size"] = 1
    steps["prepare"]["base"] |= {"task": {"kind": "lines"}, "model": {"kind": "saved", "x": 1}}
    with pytest.raises(ConfigError) as caught:
        read_steps(steps)[0].build(build)
    lines = str(caught.value).splitlines()
    # Without a stage nobody knows which parts it takes, so all of them are looked at.
    assert [line.partition(": ")[0].removeprefix("prepare.base.") for line in lines[:3]] == [
        "stage",
        "task",
        "model",
    ]


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "..", ".x", "-x", "", "a\n", "run"])
def test_a_step_has_a_name_that_a_folder_can_have(steps, name):
    steps["prepare"] = {name: steps["prepare"]["base"]}
    with pytest.raises(ConfigError, match=r"^prepare\.[\s\S]*: a step's name becomes a folder's"):
        read_steps(steps)


def test_secrets_make_another_artifact_and_are_not_in_it(steps, tmp_path):
    folders = []
    for token in ("hunter-2", "hunter-3"):
        steps["prepare"]["base"]["stage"]["hf_token"] = token
        folders.append(made(steps, tmp_path / "artifacts")["base"].parent)
        shown = json.loads((folders[-1] / "made_of.json").read_text())["parts"]["stage"]
        assert shown["hf_token"] == "***"
    assert folders[0] != folders[1]


def test_steps_are_built_on_each_other_and_leave_what_they_were_made_of(steps, tmp_path):
    models = made(steps, tmp_path / "artifacts", seed=7)
    assert (models["base"] / "out").read_text() == "text lines 7 cpu"
    assert (models["more"] / "out").read_text() == "text lines 7 cpu!"
    folder = models["more"].parent
    assert folder.parent == tmp_path / "artifacts"
    read = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert read["status"]["status"] == "done"
    assert read["result"] == {"after": {}, "seconds": {}}
    base_key = models["base"].parent.name.removeprefix("base-")
    assert read["made_of"]["parts"]["model"] == {"kind": "saved", "base_model": base_key}
    assert read["made_of"]["seed"] == 7


def test_what_is_made_already_is_not_made_again(steps, tmp_path):
    models = made(steps, tmp_path / "artifacts")
    (models["base"] / "out").write_text("touched")
    assert made(steps, tmp_path / "artifacts") == models
    assert (models["base"] / "out").read_text() == "touched"


def test_a_key_does_not_depend_on_order_place_or_what_the_stage_does_not_take(steps, tmp_path):
    first = keys(steps, tmp_path / "a")
    base = steps["prepare"]["base"]
    steps["prepare"]["base"] = {
        "reward": {"kind": "saved", "base_model": "unused"},
        **{name: dict(reversed(base[name].items())) for name in reversed(base)},
    }
    assert keys(steps, tmp_path / "b") == first


def test_a_key_changes_with_all_that_goes_into_the_step(steps, tmp_path):
    root = tmp_path / "artifacts"
    seen = [keys(steps, root), keys(steps, root, seed=1)]
    steps["prepare"]["base"]["stage"]["text"] = "other"
    seen.append(keys(steps, root))
    (tmp_path / "lines").write_text("other")
    seen.append(keys(steps, root))
    # Each of these changes the first step, and by its key the one that stands on it.
    assert len({base for base, _ in seen}) == len({more for _, more in seen}) == 4

    steps["prepare"]["more"]["stage"]["suffix"] = "?"
    base, more = keys(steps, root)
    assert base == seen[-1][0]
    assert more not in {more for _, more in seen}


def test_a_step_that_fails_is_not_taken_for_made(steps, tmp_path):
    root = tmp_path / "artifacts"
    steps["prepare"]["more"]["model"]["base_model"] = str(tmp_path / "not there")
    with pytest.raises(FileNotFoundError):
        made(steps, root)
    assert [path.name.partition("-")[0] for path in root.glob("[!.]*")] == ["base"]


def test_a_steps_texts_are_checked_before_anything_is_built_unless_an_earlier_step_makes_them(
    steps, tmp_path
):
    root = tmp_path / "artifacts"
    count = {"kind": "count", "at_least": 2}
    steps["prepare"]["few"] = {"stage": count, "task": steps["prepare"]["base"]["task"]}
    with pytest.raises(ConfigError, match=r"^prepare\.few\.stage\.at_least=2: 1 lines$"):
        made(steps, root)
    assert not root.exists()

    steps["prepare"]["few"]["stage"] = {"kind": "count"}
    steps["prepare"]["later"] = {"stage": count, "task": {"kind": "made", "path": "artifact:few"}}
    assert list(made(steps, root)) == ["base", "more", "few", "later"]


def test_a_key_changes_with_what_an_earlier_step_makes_the_task_of(steps, tmp_path):
    steps["prepare"]["few"] = {"stage": {"kind": "count"}, "task": steps["prepare"]["base"]["task"]}
    steps["prepare"]["later"] = {
        "stage": {"kind": "count"},
        "task": {"kind": "made", "path": "artifact:few"},
    }
    first = keys(steps, tmp_path / "artifacts")
    (tmp_path / "lines").write_text("another\nand another")
    second = keys(steps, tmp_path / "artifacts")
    assert first[2] != second[2]
    assert first[3] != second[3]


def test_figures_of_the_steps_are_copied_under_the_steps_names(tmp_path):
    for name, figure in (("base", "loss.png"), ("more", "loss.png"), ("more", "held_out.png")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / figure).write_text(f"{name} {figure}")
    (tmp_path / "more" / "result.json").write_text("{}")
    run = tmp_path / "run"
    run.mkdir()
    folders = {name: str(tmp_path / name) for name in ("base", "more")}
    Prepared(folders=folders, results={}, seconds={}).copy_figures(run)
    assert {path.name: path.read_text() for path in run.iterdir()} == {
        "base_loss.png": "base loss.png",
        "more_loss.png": "more loss.png",
        "more_held_out.png": "more held_out.png",
    }


def test_a_step_that_changes_the_folder_scatters_nothing(steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    away = tmp_path / "away"
    away.mkdir()
    steps["prepare"]["base"]["stage"] = {"kind": "wander", "to": str(away)}
    folders = made(steps, Path("artifacts"))
    assert Path.cwd() == tmp_path
    assert {name: (Path(folder) / "model" / "out").is_file() for name, folder in folders.items()}
    assert not [*away.iterdir()]


def test_what_a_step_measured_is_said_again_only_when_it_is_reused(steps, tmp_path, caplog):
    with caplog.at_level("INFO"):
        made(steps, tmp_path / "artifacts")
        assert "base: heldout/loss 0.500" not in caplog.messages
        made(steps, tmp_path / "artifacts")
    assert caplog.messages.count("base: heldout/loss 0.500") == 1


def test_the_code_of_parts_within_parts_goes_into_the_key():
    terms = {"a": Term(weight=1.0, reward=Keyword(keywords=["a"]))}
    assert classes_of([WeightedSum(terms=terms), "text", None]) == {WeightedSum, Term, Keyword}

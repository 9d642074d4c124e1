"""Several loggers of one run, a user's own among them, and what happens when one of them fails."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_exp.app import run
from rlhf_exp.runs.folder import RunFolder, Sink
from rlhf_exp.settings import ConfigError
from rlhf_exp.tracking.protocol import LocalLogger
from rlhf_exp.tracking.several import LOGGERS, open_sinks, split_loggers
from tests.app.test_run import TINY, train

from .wandb_runs import info

OWN = """
import json
from contextlib import contextmanager
from dataclasses import dataclass

from rlhf_exp.runs.folder import Sink


class Lines(Sink):
    def __init__(self, path):
        self.path = path

    def log(self, phase, metrics):
        with self.path.open("a") as file:
            file.write(json.dumps([phase, *metrics]) + "\\n")


@dataclass
class MyLogger:
    name: str = "lines"

    def problems(self, *, name, group):
        return [f"{self.name} is taken"] if self.name == "taken" else []

    @contextmanager
    def open(self, info):
        yield [Lines(info.shared_folder / self.name)]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a logger outside of the package, and an option `mine` of it."""
    module = f"loggers_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(OWN)
    (tmp_path / "conf" / "logger").mkdir(parents=True)
    option = f"_target_: {module}.MyLogger\nname: lines\n"
    (tmp_path / "conf" / "logger" / "mine.yaml").write_text(option)
    monkeypatch.syspath_prepend(str(tmp_path))
    return module


def lines_of(folder: Path, name: str) -> list[Any]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return lines_of(folder, "metrics.jsonl")


def test_a_logger_of_the_users_own_and_tensorboard_get_every_row(tmp_path, own):
    outcome = train(
        tmp_path, "--config-dir", str(tmp_path / "conf"), *TINY, "logger=mine",
        f"allow_targets=[{own}]", "logger.also=[tensorboard]", "hydra.run.dir=run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.out
    rows = rows_of(tmp_path / "run")
    assert lines_of(tmp_path / "run", "lines") == [[*row.values()][:1] + [*row][1:] for row in rows]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "run")).Reload()
    assert {*events.Tags()["scalars"]} == {name for row in rows for name in row} - {"phase"}
    scores = [(e.step, e.value) for e in events.Scalars("eval/score")]
    assert scores == [(row["phase"], row["eval/score"]) for row in rows if "eval/score" in row]


def test_a_logger_of_the_users_own_stands_beside_another_if_its_module_is_allowed(tmp_path, own):
    beside = f"logger.also=[{{_target_:{own}.MyLogger,name:other}}]"
    words = [*TINY, "logger=local", beside, "hydra.run.dir=run"]
    refused = train(tmp_path, *words)
    assert refused.code == 2
    assert f"logger.also.0._target_={own}.MyLogger is outside of rlhf_exp." in refused.out
    assert f"allow_targets=[{own}]" in refused.out
    outcome = train(tmp_path, *words, f"allow_targets=[{own}]")
    assert outcome.code == 0, outcome.out
    assert len(lines_of(tmp_path / "run", "other")) == len(rows_of(tmp_path / "run"))


@pytest.mark.parametrize(
    ("also", "messages"),
    [
        ("[tensorbord]", ["logger.also.0='tensorbord'", "local, tensorboard, trackio, wandb"]),
        ("tensorboard", ["logger.also='tensorboard': Input should be a list"]),
        ("[tensorboard,local]", ["logger.also.1: LocalLogger is chosen already"]),
        ("[{_target_:rlhf_exp.tasks.reviews.Reviews}]", ["logger.also.0: Reviews is not for this"]),
        ("[{_target_:OWN.MyLogger,name:taken}]", ["taken is taken"]),
    ],
)
def test_what_is_wrong_with_further_loggers_is_said_before_anything_runs(
    tmp_path, own, also, messages
):
    words = [*TINY, "logger=local", f"allow_targets=[{own}]", "hydra.run.dir=run"]
    outcome = train(tmp_path, *words, f"logger.also={also.replace('OWN', own)}")
    assert outcome.code == 2
    for message in messages:
        assert message in outcome.out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_names_are_those_of_the_options_with_their_defaults():
    options = {path.stem: OmegaConf.load(path) for path in Path(run.CONF, "logger").glob("*.yaml")}
    assert {name: option.pop("_target_") for name, option in options.items()} == LOGGERS
    problems: list[str] = []
    named = split_loggers({"_target_": "x", "also": sorted(options)}, problems)
    for name, (where, settings) in zip(sorted(options), [*named.items()][1:], strict=True):
        built = run.instantiate(settings, where, problems, allowed=run.ALLOWED_TARGETS)
        from_file = {"_target_": LOGGERS[name], **OmegaConf.to_container(options[name])}
        assert built == run.instantiate(from_file, where, problems, allowed=run.ALLOWED_TARGETS)
    assert problems == []


class Broken:
    """A tracker that fails when it is opened or closed."""

    def __init__(self, where: str, error: Exception) -> None:
        self._where, self._error = where, error

    def problems(self, *, name: str, group: str | None) -> list[str]:
        return []

    @contextmanager
    def open(self, info: Any) -> Iterator[list[Sink]]:
        if self._where == "open":
            raise self._error
        try:
            yield []
        finally:
            raise self._error


@pytest.mark.parametrize("where", ["open", "close"])
def test_a_logger_that_fails_to_open_or_close_costs_the_run_and_the_others_nothing(
    tmp_path, caplog, own, where
):
    mine = __import__(own).MyLogger()
    loggers = [Broken(where, OSError("disk full")), mine, LocalLogger()]
    with RunFolder(tmp_path, lambda: open_sinks(loggers, info(tmp_path))) as folder:
        (tmp_path / "shared").mkdir()
        folder.start()
        folder.log(1, {"a": 0.5})
    assert lines_of(tmp_path / "shared", "lines") == [[1, "a"]]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    [warning] = [text for text in warnings if "Broken" in text]
    assert "OSError: disk full" in warning


def test_what_ends_the_run_is_what_its_caller_sees_though_a_logger_fails_to_close(tmp_path):
    loggers = [Broken("close", OSError("disk full"))]
    with pytest.raises(KeyboardInterrupt), open_sinks(loggers, info(tmp_path)):
        raise KeyboardInterrupt


def test_a_logger_that_refuses_its_settings_ends_the_run(tmp_path):
    loggers = [Broken("open", ConfigError("logger.mode=online: no key"))]
    with pytest.raises(ConfigError, match="no key"), open_sinks(loggers, info(tmp_path)):
        pass

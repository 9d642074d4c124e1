import logging

import pytest
from tqdm import tqdm

from rlhf_exp.tracking.progress import (
    SHORT,
    Progress,
    file_log,
    line_log,
    log_remaining,
    on_terminal,
)


@pytest.fixture(autouse=True)
def plain_log(monkeypatch, caplog):
    """The line logger as it is before any run has sent it elsewhere."""
    monkeypatch.setattr(line_log, "propagate", True)
    monkeypatch.setattr(line_log, "handlers", [])
    caplog.set_level(logging.INFO)


class Terminal:
    """Standard error that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_plain_line_a_step_where_there_is_no_terminal(caplog, capsys):
    assert not on_terminal()
    with Progress(12, unit="phase") as progress:
        progress.advance(1, {"objective/scores": 0.51251, "objective/kl": 0.0, "time/learn_s": 3})
        progress.advance(12, {"objective/scores": 0.6})
    assert caplog.messages == ["phase  1/12  score 0.513  kl 0.000", "phase 12/12  score 0.600"]
    assert capsys.readouterr().err == ""


def test_a_line_of_dpo_has_what_the_pairs_are_like(caplog):
    metrics = {"train/loss": 0.5, "rewards/margins": 0.25, "rewards/accuracies": 0.75}
    with Progress(4, unit="update") as progress:
        progress.advance(1, {**metrics, "rewards/chosen": 9.0})
    assert caplog.messages == ["update 1/4  loss 0.500  margin 0.250  accuracy 0.750"]


def test_a_bar_on_a_terminal_and_the_same_lines_in_the_log(caplog, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # no thread that outlives the test
    assert on_terminal()
    with Progress(4, unit="update") as progress:
        progress.advance(3, {"train/loss": 1.25})
        progress.bar.refresh()
    assert "3/4" in terminal.text
    assert "loss=1.250" in terminal.text
    assert caplog.messages == ["update 3/4  loss 1.250"]


def test_the_first_step_that_is_one_says_how_long_the_rest_takes(caplog, monkeypatch):
    now = iter([100.0, 106.0])
    monkeypatch.setattr("rlhf_exp.tracking.progress.time.monotonic", lambda: next(now))
    with Progress(50, unit="pair") as progress:
        progress.start(10)
        progress.advance(10, {})  # a batch without pairs
        progress.advance(14, {})
        progress.advance(18, {})
    assert [line for line in caplog.messages if " to go" in line] == [
        "about 54 s to go: pairs 36 x 1.50 s"
    ]
    assert caplog.messages.index("about 54 s to go: pairs 36 x 1.50 s") == 2


def test_nothing_is_said_of_a_rest_that_is_none(caplog):
    caplog.set_level(logging.INFO, logger="rlhf_exp")
    log_remaining(phases=(0, 2.0), evaluations=(0, 3.0))
    assert caplog.messages == []
    log_remaining(phases=(0, 2.0), evaluations=(1, 3.0))
    assert caplog.messages == ["about 3 s to go: evaluations 1 x 3.00 s"]


@pytest.fixture
def log_file(tmp_path):
    """train.log as the only file that the package's loggers write to."""
    handler = logging.FileHandler(tmp_path / "train.log")
    own = logging.getLogger("rlhf_exp.file")
    package = logging.getLogger("rlhf_exp")
    before = own.handlers, own.propagate, package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    yield tmp_path / "train.log"
    package.removeHandler(handler)
    handler.close()
    own.handlers, own.propagate = before[:2]
    package.setLevel(before[2])


def test_the_file_log_writes_to_the_file_alone(log_file, caplog):
    file_log().info("only here")
    line_log.info("here and there")
    assert log_file.read_text().splitlines() == ["only here", "here and there"]
    assert caplog.messages == ["here and there"]


def test_while_a_bar_is_on_the_terminal_lines_go_to_the_file_alone(log_file, caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    own = file_log()
    line_log.info("update 1/4")
    own.info("the rest")
    assert log_file.read_text().splitlines() == ["update 1/4", "the rest"]
    assert caplog.messages == []


@pytest.mark.parametrize("name", sorted(SHORT))
def test_every_short_name_is_shown(name, caplog):
    with Progress(1, unit="pair") as progress:
        progress.advance(1, {name: 0.25, "unknown": 1.0})
    assert caplog.messages == [f"pair 1/1  {SHORT[name]} 0.250"]

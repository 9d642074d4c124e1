"""A state is saved when it is time, and comes back with all that stands beside it."""

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_exp.runs.checkpoint import read_newest_checkpoint, write_checkpoint
from rlhf_exp.runs.context import Context
from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.runs.stopping import Interrupted, StopRequests
from rlhf_exp.settings import ConfigError
from rlhf_exp.training.saver import FORMAT, Saver, check_inputs, join_state, split_state

from ..states import assert_equal_states


class Counter:
    """Counts its steps, in a tensor and in a number."""

    def __init__(self):
        self.tensor, self.number = torch.zeros(2), 0

    def step(self):
        self.tensor += 1
        self.number += 1

    def state_dict(self):
        return {"tensor": self.tensor, "number": self.number}

    def load_state_dict(self, state):
        self.tensor, self.number = state["tensor"].clone(), state["number"]


def context(path: Path, *, resume: bool = False) -> Context:
    stop = StopRequests()
    return Context(
        folder=RunFolder(path), seed=1, device=torch.device("cpu"), resume=resume, stop=stop
    )


def phases(path: Path) -> list[int]:
    return sorted(int(p.name[-6:]) for p in (path / "checkpoints").glob("phase-*"))


def train(given: Context, *, steps: int, every: int | None, best: int = 0, ask_at: int = 0):
    """Counts and logs so many steps; asks itself to stop in one of them."""
    state = Counter()
    saver = Saver(given, {"counter": state}, interval=every)
    resumed = saver.restore()
    with given.stop.listening(), saver.steps():
        while state.number < steps:
            state.step()
            # Not Python's: the checks of types that tests run with draw from it.
            drawn = {"numpy": float(np.random.rand()), "torch": torch.rand(1).item()}
            given.folder.log(state.number, drawn)
            if state.number == ask_at:
                os.kill(os.getpid(), signal.SIGTERM)
            is_best = state.number == best
            saver.step_done(
                state.number,
                is_last=state.number == steps,
                score=1.0 if is_best else None,
                is_best=is_best,
            )
    return resumed, state


def test_it_is_saved_every_so_many_steps_at_the_best_and_at_the_end(tmp_path):
    train(context(tmp_path / "a"), steps=7, every=3)
    assert phases(tmp_path / "a") == [6, 7]
    train(context(tmp_path / "b"), steps=7, every=3, best=2)
    assert phases(tmp_path / "b") == [2, 6, 7]
    train(context(tmp_path / "c"), steps=7, every=None, best=2)
    assert phases(tmp_path / "c") == []


@pytest.mark.parametrize("every", [2, None])
def test_asked_to_stop_it_saves_and_goes_on_from_there_with_all_generators(tmp_path, every):
    def seed():
        np.random.seed(5)
        torch.manual_seed(5)

    seed()
    train(context(tmp_path / "whole"), steps=6, every=every)
    seed()
    with pytest.raises(Interrupted, match=r"^SIGTERM$"):
        train(context(tmp_path / "cut"), steps=6, every=every, ask_at=3)
    assert phases(tmp_path / "cut") == ([2, 3] if every else [3])
    np.random.rand(), torch.rand(4)
    resumed, state = train(context(tmp_path / "cut", resume=True), steps=6, every=every)
    assert resumed
    assert state.tensor.tolist() == [6, 6]
    rows = RunFolder(tmp_path / "cut").rows()
    assert rows == RunFolder(tmp_path / "whole").rows()
    assert len(rows) == 6


def test_in_its_last_step_it_is_finished_instead(tmp_path):
    _, state = train(context(tmp_path), steps=3, every=1, ask_at=3)
    assert state.number == 3
    assert phases(tmp_path) == [2, 3]


def test_rows_after_the_checkpoint_are_removed_and_written_again(tmp_path):
    class Died(Exception):
        pass

    def die(given):
        state = Counter()
        saver = Saver(given, {"counter": state}, interval=2)
        saver.restore()
        with saver.steps():
            for number in (1, 2, 3):
                state.step()
                given.folder.log(number, {"a": 1.0})
                if number == 3:
                    raise Died
                saver.step_done(number, is_last=False)

    with pytest.raises(Died):
        die(context(tmp_path))
    given = context(tmp_path, resume=True)
    assert [row["phase"] for row in given.folder.rows()] == [1, 2, 3]
    state = Counter()
    assert Saver(given, {"counter": state}, interval=2).restore()
    assert [row["phase"] for row in given.folder.rows()] == [1, 2]
    assert state.number == 2


def test_a_run_that_is_resumed_before_it_saved_begins_anew(tmp_path):
    given = context(tmp_path, resume=True)
    given.folder.log(1, {"a": 1.0})
    resumed, state = train(given, steps=2, every=1)
    assert not resumed
    assert state.number == 2
    assert [row["phase"] for row in given.folder.rows()] == [1, 2]


def test_a_run_that_is_not_resumed_restores_nothing(tmp_path):
    train(context(tmp_path), steps=2, every=1)
    assert not Saver(context(tmp_path), {"counter": Counter()}, interval=1).restore()


def test_the_name_of_the_run_is_saved_with_it(tmp_path):
    given = context(tmp_path)
    train(given, steps=2, every=1)
    newest = read_newest_checkpoint(tmp_path)
    assert newest.numbers["run_id"] == given.folder.run_id


def test_parts_are_saved_each_under_its_name(tmp_path):
    parts = {"one": Counter(), "other": Counter()}
    parts["one"].step()
    saver = Saver(context(tmp_path), parts, interval=1)
    with saver.steps():
        saver.step_done(1, is_last=True)
    again = {"one": Counter(), "other": Counter()}
    assert Saver(context(tmp_path, resume=True), again, interval=1).restore()
    assert [part.number for part in again.values()] == [1, 0]
    assert again["one"].tensor.tolist() == [1, 1]


def test_a_state_survives_a_checkpoint_whatever_its_names(tmp_path):
    state = {
        "h.0.weight": torch.ones(2),
        "h": {"0.weight": torch.zeros(2), "0": {"weight": torch.arange(3), "bias": None}},
        "": {"a b/c": {}, "empty": torch.empty(0)},
        "rows": [[1, 2], []], "rate": 0.1 + 0.2, "best": -math.inf, "name": "h.0.weight",
    }  # fmt: skip
    tensors, numbers = split_state(state)
    assert tensors["h.0.weight"] is state["h.0.weight"]  # a writer knows the optimizer's by that
    write_checkpoint(tmp_path, 1, tensors, numbers)
    assert_equal_states(join_state(*read_newest_checkpoint(tmp_path)), state)


def test_two_tensors_of_one_name_are_a_mistake():
    with pytest.raises(AssertionError, match="two tensors are called a/b"):
        split_state({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}})


@pytest.mark.parametrize("version", [{}, {"format": 2}, {"format": FORMAT + 1}])
def test_a_checkpoint_of_another_format_is_refused_and_left_as_it_was(tmp_path, version):
    given = context(tmp_path, resume=True)
    for phase in (1, 2, 3):
        given.folder.log(phase, {"a": 1.0})
    # As the first were: names joined by dots, and no number of the format.
    tensors = {"tensor": torch.ones(2), "random.cpu": torch.get_rng_state()}
    random = {"python": [3, [0] * 625, None], "numpy": ["MT19937", [0] * 624, 624, 0, 0.0]}
    numbers = {"phase": 2, "state": {"number": 2}, "random": random, "sizes": {}, "run_id": "x"}
    write_checkpoint(tmp_path, 2, tensors, {**numbers, **version})
    state = Counter()
    message = (
        r"its checkpoint has a format that this version does not read; start the run again, or"
        r" finish it with the version that wrote it \(see environment\.txt\)$"
    )
    with pytest.raises(ConfigError, match=message):
        Saver(given, {"counter": state}, interval=1).restore()
    assert state.number == 0
    assert len(given.folder.rows()) == 3
    assert phases(tmp_path) == [2]


def test_other_inputs_are_refused_by_the_name_of_the_field():
    check_inputs({"task": "a", "more": "b"}, {"task": "a"})
    for now in ({"task": "c"}, {}):
        with pytest.raises(ConfigError, match=r"^task: the files that it names have changed"):
            check_inputs(now, {"task": "a"})

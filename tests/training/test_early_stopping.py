"""When training ends, which weights are kept, and how both go on in a resumed run."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_exp.runs.context import Context, TrainingError
from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.training.early_stopping import EarlyStopping

from ..states import through_a_file

Metrics = dict[str, float]


def stopping(path: Path, measured: Sequence[Metrics], **options: Any) -> tuple[EarlyStopping, Any]:
    """An early stopping whose measurements are those, one after the other, and the weight that it
    looks after."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    left = iter(measured)
    context = Context(folder=RunFolder(path), seed=1, device=torch.device("cpu"))
    return EarlyStopping(context, network, lambda update: next(left), **options), network.weight


def trained(
    path: Path, measured: Sequence[Metrics], *, updates: int, **options: Any
) -> tuple[EarlyStopping, list[bool], float]:
    """After at most so many updates, of which each adds 1 to a weight: the object, what it
    answered, and the weight after the best was put back."""
    stop, weight = stopping(path, measured, **{"eval_every": 2, **options})
    answers: list[bool] = []
    while len(answers) < updates and not any(answers):
        with torch.no_grad():
            weight.add_(1)
        answers.append(stop(len(answers) + 1))
    stop.restore_best(len(answers))
    return stop, answers, weight.item()


def exact(*rates: float) -> list[Metrics]:
    """Measurements whose losses say the opposite of their rates."""
    return [{"heldout/loss": r, "heldout/exact_match": r} for r in rates]


def losses(*values: float) -> list[Metrics]:
    return [{"heldout/loss": value} for value in values]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_best_exact_match_is_kept_the_first_of_equals(tmp_path: Path) -> None:
    _, answers, weight = trained(tmp_path, exact(0.2, 0.5, 0.4, 0.5), updates=8)
    assert weight == 4
    assert answers == [False] * 8
    assert [row["phase"] for row in rows(tmp_path)] == [2, 4, 6, 8]
    assert [row["heldout/exact_match"] for row in rows(tmp_path)] == [0.2, 0.5, 0.4, 0.5]


def test_of_equal_rates_the_one_with_the_lower_loss_is_kept(tmp_path: Path) -> None:
    none_yet = [{"heldout/loss": loss, "heldout/exact_match": 0.0} for loss in (3.0, 1.0, 2.0)]
    assert trained(tmp_path, none_yet, updates=6)[2] == 4


def test_the_lowest_loss_is_kept_where_there_are_no_answers_the_first_of_equals(
    tmp_path: Path,
) -> None:
    _, answers, weight = trained(tmp_path, losses(3.0, 1.0, 2.0, 1.0), updates=8)
    assert weight == 4
    assert answers == [False] * 8
    assert rows(tmp_path)[1] == {"phase": 4, "heldout/loss": 1.0}


def test_what_is_not_trained_is_not_kept(tmp_path: Path) -> None:
    stop, weight = stopping(tmp_path, losses(1.0), eval_every=1)
    weight.requires_grad_(False)
    stop(1)
    assert stop.state_dict()["weights"] == {}


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    measured = [{"heldout/loss": math.inf, "heldout/exact_match": 1.0}, *exact(0.2)]
    assert trained(tmp_path, measured, updates=4, stop_at=0.9)[2] == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_could_never_be_measured_end_the_run(tmp_path: Path, bad: float) -> None:
    message = r"^update 4: no held-out loss was finite; lower optimizer\.base_lr$"
    with pytest.raises(TrainingError, match=message):
        trained(tmp_path, losses(bad, bad), updates=4)
    with pytest.raises(TrainingError, match=r"; lower these$"):
        trained(tmp_path, losses(bad, bad), updates=4, lr_fields="these")


def test_the_first_rate_that_is_enough_ends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, answers, weight = trained(tmp_path, exact(0.2, 0.7, 0.9), updates=9, stop_at=0.7)
    assert answers == [False, False, False, True]
    assert weight == 4
    assert "was not reached" not in caplog.text


def test_a_loss_is_no_rate_to_stop_at(tmp_path: Path) -> None:
    assert trained(tmp_path, losses(9.0, 0.1), updates=4, stop_at=0.5)[1] == [False] * 4


def test_patience_is_the_measurements_without_a_better_one(tmp_path: Path) -> None:
    measured = losses(3.0, 4.0, 2.0, 2.5, 2.0, 1.0)
    _, answers, weight = trained(tmp_path, measured, updates=20, patience=2)
    assert answers == [False] * 9 + [True]
    assert weight == 6


@pytest.mark.parametrize(("last", "kept"), [(0.5, 5), (1.5, 2)])
def test_the_last_update_is_measured_too(tmp_path: Path, last: float, kept: float) -> None:
    assert trained(tmp_path, losses(1.0, 2.0, last), updates=5)[2] == kept
    assert [row["phase"] for row in rows(tmp_path)] == [2, 4, 5]


def test_a_rate_that_was_not_reached_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, weight = trained(tmp_path, exact(0.2, 0.5, 0.6), updates=5, stop_at=0.7)
    assert weight == 5
    assert caplog.messages == [
        "stage.stop_at=0.7 was not reached: the best exact-match rate is 0.600 after 5 updates;"
        " raise stage.epochs, stage.max_updates or stage.max_seconds"
    ]


def test_without_measurements_the_last_weights_stay(tmp_path: Path) -> None:
    _, answers, weight = trained(tmp_path, [], updates=3, eval_every=None)
    assert answers == [False] * 3
    assert weight == 3
    assert not [*tmp_path.iterdir()]


def test_a_run_that_goes_on_knows_the_best_and_its_patience(tmp_path: Path) -> None:
    first, weight = stopping(tmp_path, losses(2.0, 3.0), eval_every=1, patience=2)
    for update in (1, 2):
        with torch.no_grad():
            weight.fill_(update)
        assert not first(update)
    state = through_a_file(first.state_dict(), tmp_path)
    other, weight = stopping(tmp_path, losses(2.5), eval_every=1, patience=2)
    other.load_state_dict(state)
    assert other(3), "two measurements without a better one"
    other.restore_best(3)
    assert weight.item() == 1


def test_a_run_that_had_reached_its_rate_has_reached_it_when_it_goes_on(tmp_path: Path) -> None:
    best, _, _ = trained(tmp_path / "a", exact(0.2, 0.7), updates=4, stop_at=0.7)
    other, weight = stopping(tmp_path / "b", [], eval_every=2, stop_at=0.7)
    other.load_state_dict(through_a_file(best.state_dict(), tmp_path))
    other.restore_best(4)  # it was measured at update 4, so that it is not measured again
    assert weight.item() == 4


def test_time_goes_on_where_it_was(tmp_path: Path) -> None:
    stop, _ = stopping(tmp_path, [], eval_every=None, max_seconds=1e6)
    assert not stop(1)
    stop.load_state_dict({**stop.state_dict(), "seconds": 2e6})
    assert stop(2), "the seconds of the run before it was cut count too"


def test_time_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ticks = iter([100.0, 103.0, 105.0, 105.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    _, answers, weight = trained(tmp_path, exact(0.1, 0.2), updates=4, max_seconds=5.0)
    assert answers == [False, False, True]
    assert weight == 3
    assert caplog.messages == ["stage.max_seconds is over at update 3"]

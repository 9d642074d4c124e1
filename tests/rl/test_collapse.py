"""Warnings of collapse: raised where they should be, told once, and kept in the state."""

import logging
from collections.abc import Mapping
from dataclasses import asdict

import pytest
import torch

from rlhf_exp.rl.collapse import CollapseMonitor
from rlhf_exp.types import Completions, PromptBatch, Rollout

WELL = {
    "sample/distinct_3": 0.8,
    "objective/entropy": 1.5,
    "objective/kl": 0.1,
    "val/explained_variance": 0.2,
}
SCORES, LENGTHS = (1.0, 2.0, 1.5), (4, 2, 1)
NAMES = {
    "warn/repeats",
    "warn/low_entropy",
    "warn/equal_scores",
    "warn/one_token",
    "warn/never_ends",
    "warn/high_kl",
    "warn/bad_values",
}


def rollout(scores: tuple[float, ...] = SCORES, lengths: tuple[int, ...] = LENGTHS) -> Rollout:
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    ones = torch.ones(len(lengths), 1, dtype=torch.bool)
    prompts = PromptBatch(tokens=ones.long(), mask=ones, rows=({"prompt": ""},) * len(lengths))
    columns = ("logprobs", "ref_logprobs", "values", "kl", "entropy", "kept_mass")
    return Rollout(
        completions=Completions(
            prompts=prompts, tokens=mask.long(), mask=mask, texts=("",) * len(lengths)
        ),
        ref_hidden=torch.zeros(*mask.shape, 2),
        scores=torch.tensor(scores),
        **{name: mask.float() for name in columns},
    )


def look(
    monitor: CollapseMonitor,
    phase: int,
    given: Rollout | None = None,
    ended: tuple[bool, ...] | None = (True, False, True),
    gen_len: int = 4,
    **metrics: float,
) -> set[str]:
    """The warnings that are up."""
    seen: Mapping[str, float] = {**WELL, **{k.replace("__", "/"): v for k, v in metrics.items()}}
    found = monitor.update(
        phase, seen, given or rollout(), gen_len=gen_len,
        ended=None if ended is None else torch.tensor(ended),
    )  # fmt: skip
    assert found.keys() == NAMES
    assert set(found.values()) <= {0.0, 1.0}
    return {name for name, value in found.items() if value}


def settled() -> CollapseMonitor:
    """One that has seen ten healthy phases."""
    monitor = CollapseMonitor()
    for phase in range(1, 11):
        assert look(monitor, phase) == set()
    return monitor


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"sample__distinct_3": 0.39}, "warn/repeats"),
        ({"objective__entropy": 0.09}, "warn/low_entropy"),
        ({"given": rollout(scores=(0.1, 0.1, 0.1))}, "warn/equal_scores"),
        ({"given": rollout(lengths=(1, 1, 1))}, "warn/one_token"),
        ({"ended": (False, False, False)}, "warn/never_ends"),
        ({"objective__kl": 1.1}, "warn/high_kl"),
        ({"val__explained_variance": -1.1}, "warn/bad_values"),
    ],
)
def test_each_sign_is_told_once_until_it_is_gone(given, name, caplog):
    monitor = settled()
    for phase in (11, 12):
        assert look(monitor, phase, **given) == {name}
    told = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert [r.message.partition(": ")[0] for r in told] == [f"phase 11, {name}"]
    assert look(monitor, 13) == set()
    assert look(monitor, 14, **given) == {name}
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"sample__distinct_3": 0.41},
        {"objective__entropy": 0.11},
        {"given": rollout(lengths=(1, 1, 2))},
        {"given": rollout(lengths=(1, 1, 1)), "gen_len": 1},
        {"given": rollout(scores=(0.5,), lengths=(3,)), "ended": (True,)},
        {"given": rollout(scores=(float("nan"),) * 3)},
        {"ended": None},
        {"objective__kl": 0.9},
        {"val__explained_variance": -0.9},
        {"objective__kl": float("nan"), "val__explained_variance": float("nan")},
    ],
    ids=str,
)
def test_what_is_short_of_it_is_no_sign(given):
    assert look(settled(), 11, **given) == set()


def test_what_was_so_from_the_first_is_no_sign():
    monitor = CollapseMonitor()
    low = {"sample__distinct_3": 0.3, "objective__entropy": 0.05, "val__explained_variance": -5.0}
    for phase in range(1, 9):
        assert look(monitor, phase, **low) == set()
    assert look(monitor, 9, **low) == {"warn/bad_values"}


def test_it_is_the_mean_of_the_first_five_phases_that_counts():
    monitor = CollapseMonitor()
    for phase, distinct in enumerate((0.9, 0.8, 0.7, 0.6, 0.5, 0.1, 0.1, 0.1), 1):
        found = look(monitor, phase, sample__distinct_3=distinct)
        assert found == ({"warn/repeats"} if phase > 5 else set())
    assert look(monitor, 9, sample__distinct_3=0.36) == set()
    assert look(monitor, 10, sample__distinct_3=0.34) == {"warn/repeats"}


def test_a_watch_goes_on_from_what_is_saved_of_it(caplog):
    monitor = settled()
    look(monitor, 11, objective__kl=2.0)
    caplog.clear()
    again = CollapseMonitor(**asdict(monitor))
    assert look(again, 12, objective__kl=2.0) == {"warn/high_kl"}
    assert caplog.records == []
    assert look(again, 13, sample__distinct_3=0.3) == {"warn/repeats"}

"""A reward that raises, hangs or gives nonsense, once or always."""

import logging
import math
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_exp.rewards.attempts import ONCE, CheckedReward, RetryPolicy
from rlhf_exp.rewards.protocol import RewardError, TextReward
from rlhf_exp.settings import settings
from rlhf_exp.types import Completions, PromptBatch

THRICE = RetryPolicy(retries=2, wait_s=0.0)
WATCHED = RetryPolicy(retries=2, wait_s=0.0, timeout_s=30.0)
GIVEN = [1.0, 2.0, 3.0]


def completions(*texts: str) -> Completions:
    ones = torch.ones(len(texts), 1, dtype=torch.bool)
    prompts = PromptBatch(
        tokens=ones.long(), mask=ones, rows=tuple({"prompt": "p "} for _ in texts)
    )
    return Completions(prompts=prompts, tokens=ones.long(), mask=ones, texts=texts)


BATCH = completions("a", "b", "c")


def failing(*faults: Callable[[], Tensor] | None) -> tuple[Callable[..., Tensor], list[int]]:
    """A reward with one fault a call, then none, and the calls that it had."""
    calls: list[int] = []

    def score(completions: Completions) -> Tensor:
        calls.append(len(calls))
        fault = faults[calls[-1]] if calls[-1] < len(faults) else None
        return torch.tensor(GIVEN) if fault is None else fault()

    return score, calls


def broken() -> Tensor:
    raise KeyError("no such thing")


def exiting() -> Tensor:
    sys.exit("bye")


FAULTS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "raises": (broken, r"the reward raised KeyError: 'no such thing' at .*test_attempts\.py:\d+"),
    "exits": (exiting, r"the reward raised SystemExit: bye at .*test_attempts\.py:\d+"),
    "nan": (lambda: torch.tensor([1.0, math.nan, 2.0]), r"gave nan for 1 of 3 .*first: 'p b'"),
    "inf": (lambda: torch.tensor([-math.inf, math.inf, 2.0]), r"gave -inf for 2 of 3 .*: 'p a'"),
    "too few": (lambda: torch.zeros(2), r"scores of shape \(2,\) for 3 samples"),
    "too deep": (lambda: torch.zeros(3, 1), r"scores of shape \(3, 1\) for 3 samples"),
    "a list": (lambda: [1.0, 2.0, 3.0], "AttributeError: 'list' object has no attribute 'float'"),
}


@pytest.mark.parametrize(
    "patience", [ONCE, RetryPolicy(timeout_s=30.0)], ids=["here", "on a thread"]
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_its_phase(fault: str, patience: RetryPolicy) -> None:
    make, message = FAULTS[fault]
    score, calls = failing(make)
    with pytest.raises(RewardError, match=rf"^phase 7: .*{message}") as raised:
        CheckedReward(score, patience)(BATCH, phase=7)
    assert "attempts failed" not in str(raised.value)
    assert len(calls) == 1


@pytest.mark.parametrize("patience", [THRICE, WATCHED], ids=["here", "on a thread"])
@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_asked_again(
    fault: str, patience: RetryPolicy, caplog: pytest.LogCaptureFixture
) -> None:
    make, message = FAULTS[fault]
    score, calls = failing(make, make)
    assert CheckedReward(score, patience)(BATCH, phase=7).tolist() == GIVEN
    assert len(calls) == 3
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2
    for number, record in enumerate(told, 1):
        assert record.message.startswith(f"phase 7: attempt {number} of 3 to get scores failed")
    caplog.clear()

    score, calls = failing(*[make] * 4)
    with pytest.raises(RewardError, match=rf"^phase 7: .*{message}.* \(3 attempts failed\)$"):
        CheckedReward(score, patience)(BATCH, phase=7)
    assert len(calls) == 3
    assert len(caplog.records) == 2


def test_the_wait_grows() -> None:
    score, _ = failing(broken, broken)
    before = time.monotonic()
    CheckedReward(score, RetryPolicy(retries=2, wait_s=0.05))(BATCH, phase=1)
    assert time.monotonic() - before >= 0.05 + 0.1


def test_a_call_that_hangs_is_given_up_and_asked_again() -> None:
    release, threads = threading.Event(), []

    def hang() -> Tensor:
        threads.append(threading.current_thread())
        release.wait(60)
        return torch.zeros(3)

    score, calls = failing(hang)
    patience = RetryPolicy(retries=1, timeout_s=0.2)
    try:
        assert CheckedReward(score, patience)(BATCH, phase=1).tolist() == GIVEN
        assert len(calls) == 2
        # The process does not wait for it.
        assert threads[0].is_alive()
        assert threads[0].daemon
        score, _ = failing(hang, hang)
        with pytest.raises(RewardError, match=r"no scores within 0\.2 s; .*reward_timeout_s"):
            CheckedReward(score, patience)(BATCH, phase=1)
    finally:
        release.set()


@pytest.mark.parametrize("patience", [ONCE, WATCHED], ids=["here", "on a thread"])
def test_what_belongs_to_a_thread_serves_every_call(patience: RetryPolicy) -> None:
    """SQLite refuses connections of other threads, and a threading.local is empty on them."""
    kept, loads = threading.local(), []

    def score(completions: Completions) -> Tensor:
        if not hasattr(kept, "connection"):
            loads.append(threading.current_thread())
            kept.connection = sqlite3.connect(":memory:")
            score.connection = kept.connection
        score.connection.execute("select 1")
        return torch.tensor(GIVEN)

    reward = CheckedReward(score, patience)
    for phase in range(3):
        assert reward(BATCH, phase=phase).tolist() == GIVEN
    assert len(loads) == 1
    assert (loads[0] is threading.main_thread()) == (patience is ONCE)


def handle_alarms() -> Tensor:
    signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
    return torch.tensor(GIVEN)


OF_THE_MAIN_THREAD = sqlite3.connect(":memory:")


def ask_the_database() -> Tensor:
    OF_THE_MAIN_THREAD.execute("select 1")
    return torch.tensor(GIVEN)


@pytest.mark.parametrize("needs_main", [handle_alarms, ask_the_database])
def test_what_needs_the_main_thread_is_told_how_to_get_it(needs_main) -> None:
    def wrapping(completions: Completions) -> Tensor:
        try:
            return needs_main()
        except Exception as error:
            raise RewardError("reward.function=a.py:f raised it") from error

    for score in (lambda _: needs_main(), wrapping):
        with pytest.raises(RewardError, match=r"set stage\.guards\.reward_timeout_s=null"):
            CheckedReward(score, WATCHED)(BATCH, phase=1)
        assert CheckedReward(score, THRICE)(BATCH, phase=1).tolist() == GIVEN
    score, _ = failing(broken)
    with pytest.raises(RewardError) as raised:
        CheckedReward(score, RetryPolicy(timeout_s=30.0))(BATCH, phase=1)
    assert "reward_timeout_s" not in str(raised.value)


def test_a_timeout_of_the_rewards_own_is_a_fault_like_others() -> None:
    def late() -> Tensor:
        raise TimeoutError("the judge sleeps")

    score, _ = failing(late)
    with pytest.raises(RewardError, match="raised TimeoutError: the judge sleeps"):
        CheckedReward(score, RetryPolicy(timeout_s=30.0))(BATCH, phase=1)


def test_nobody_is_asked_again_for_memory_or_for_the_user() -> None:
    def big() -> Tensor:
        return torch.empty(2**50)

    def interrupted() -> Tensor:
        raise KeyboardInterrupt

    for fault, error in ((big, RuntimeError), (interrupted, KeyboardInterrupt)):
        for patience in (THRICE, WATCHED):
            score, calls = failing(fault)
            with pytest.raises(error) as raised:
                CheckedReward(score, patience)(BATCH, phase=1)
            assert not isinstance(raised.value, RewardError)
            assert len(calls) == 1


@settings
class Buggy(TextReward):
    """Divides by the number of times that a letter occurs."""

    def score(self, text: str) -> float:
        return 1 / text.count("a")


def test_a_bug_in_a_reward_of_ones_own_is_told_with_its_line() -> None:
    with pytest.raises(RewardError, match=r"ZeroDivisionError: .* at .*test_attempts\.py:\d+$"):
        CheckedReward(Buggy().load(torch.device("cpu")))(BATCH, phase=2)

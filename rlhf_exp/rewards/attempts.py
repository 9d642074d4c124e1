"""Calls a reward that may raise, hang or return nonsense: retries it and checks its scores.

Knows when a call has failed and how often to retry it, not what to do without scores.
"""

import logging
import time
from concurrent.futures import wait
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rlhf_exp.machine.background import Background
from rlhf_exp.rewards.faults import describe_fault
from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rewards.weighted_sum import SumOfRewards
from rlhf_exp.training.out_of_memory import is_out_of_memory
from rlhf_exp.types import Completions

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often to retry a reward that failed, the seconds to wait before the first retry (doubled
    before each further one), and the seconds after which a call counts as hanging (None: never)."""

    retries: int = 0
    wait_s: float = 0.0
    timeout_s: float | None = None


ONCE = RetryPolicy()


class CheckedReward:
    """A reward that is retried when it fails, and whose scores are checked.

    All calls run on one thread, because connections (SQLite), caches (threading.local) and event
    loops belong to the thread that created them. With a timeout, or if `on_thread`, this is a
    separate thread, which is replaced when a call hangs; else the caller's.
    """

    def __init__(
        self, reward: RewardFunction, retry: RetryPolicy = ONCE, *, on_thread: bool = False
    ) -> None:
        self._reward, self._retry = reward, retry
        self._has_thread = on_thread or retry.timeout_s is not None
        self._thread: Background | None = None

    def __call__(self, completions: Completions, *, phase: int) -> Float[Tensor, " batch"]:
        """The reward's scores in fp32. Raises RewardError naming the phase and the cause if every
        attempt raised, hung or did not return one finite score for each completion. Running out of
        memory is raised at once and unchanged."""
        return self._scores(completions, self._reward, phase)

    def by_term(
        self, completions: Completions, *, phase: int
    ) -> tuple[Float[Tensor, " batch"], dict[str, Float[Tensor, " batch"]]]:
        """The scores, and those of each term of a sum of rewards. Raises RewardError as a call."""
        total = self._reward
        if not isinstance(total, SumOfRewards):
            return self(completions, phase=phase), {}
        rows = self._scores(completions, total.stack, phase)
        return total.combine(rows), dict(zip(total.terms, rows, strict=True))

    def _scores(self, completions: Completions, reward: RewardFunction, phase: int) -> Tensor:
        attempts, wait_s = self._retry.retries + 1, self._retry.wait_s
        for attempt in range(1, attempts + 1):
            try:
                return self._attempt(completions, reward)
            except RewardError as error:
                if attempt == attempts:
                    tried = f" ({attempts} attempts failed)" if attempts > 1 else ""
                    raise RewardError(f"phase {phase}: {error}{tried}") from error
                log.warning(
                    "phase %d: attempt %d of %d to get scores failed, the next is in %g s: %s",
                    phase, attempt, attempts, wait_s, error,
                )  # fmt: skip
            time.sleep(wait_s)
            wait_s *= 2
        raise AssertionError("unreachable")

    def _attempt(self, completions: Completions, reward: RewardFunction) -> Tensor:
        try:
            scores = self._call(completions, reward)
        except RewardError as error:
            raise RewardError(f"{error}{self._hint(error.__cause__)}") from error
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            fault = describe_fault(error, caller=__file__)
            raise RewardError(f"the reward raised {fault}{self._hint(error)}") from error
        for row in [scores] if reward is self._reward else scores:  # or a row for each term
            _check(row, completions)
        return scores

    def _call(self, completions: Completions, reward: RewardFunction) -> Tensor:
        if not self._has_thread:
            return reward(completions).float()
        if self._thread is None:
            self._thread = Background("reward call")
        scores = self._thread.submit(lambda: reward(completions).float())
        timeout_s = self._retry.timeout_s
        if not wait([scores], timeout_s).done:
            self._thread = None  # the hanging call blocks it for good
            raise RewardError(
                f"the reward gave no scores within {timeout_s:g} s; if it needs longer, raise"
                " stage.guards.reward_timeout_s or set it null"
            )
        return scores.result()

    def _hint(self, error: BaseException | None) -> str:
        """Advice for an error that only calls on the main thread avoid, else ""."""
        if not self._has_thread or "thread" not in str(error):
            return ""
        return (
            "\nthe reward runs on another thread, so that a hanging call can be abandoned; to run"
            " it on the main thread, set stage.guards.reward_timeout_s=null and"
            " stage.compute.async_reward=false"
        )


def _check(scores: Tensor, completions: Completions) -> None:
    """Raises RewardError unless there is a finite score for each completion."""
    if scores.shape != (len(completions.texts),):
        raise RewardError(
            f"the reward gave scores of shape {tuple(scores.shape)} for"
            f" {len(completions.texts)} samples; it must give one for each"
        )
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"the reward gave {scores[bad[0]].item()} for {len(bad)} of {len(scores)} samples, the"
            f" first: {completions.full_texts[bad[0]]!r}"
        )

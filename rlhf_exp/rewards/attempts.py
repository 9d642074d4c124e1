"""Scores of a reward that may raise, hang or give nonsense: asked again, and checked.

It knows when a reward has failed and how often to ask it, not what is to be done without scores.
"""

import logging
import time
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb

from jaxtyping import Float
from torch import Tensor

from rlhf_exp.machine.background import Background
from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.training.memory import is_out_of_memory
from rlhf_exp.types import Completions

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often a reward is asked again after it failed, after how many seconds the first time
    (twice as many at each further time), and after how many seconds a call counts as hanging (None:
    it is waited for)."""

    retries: int = 0
    wait_s: float = 0.0
    timeout_s: float | None = None


ONCE = Patience()


class PatientReward:
    """A reward that is asked again where it fails, and whose scores are checked.

    All of its calls are made on one thread, since connections (SQLite), caches (threading.local)
    and event loops belong to the thread that made them: with a timeout, or if `on_thread`, on one
    of its own, which is replaced when a call hangs there; else on the caller's.
    """

    def __init__(
        self, reward: RewardFunction, patience: Patience = ONCE, *, on_thread: bool = False
    ) -> None:
        self._reward, self._patience = reward, patience
        self._has_thread = on_thread or patience.timeout_s is not None
        self._thread: Background | None = None

    def __call__(self, completions: Completions, *, phase: int) -> Float[Tensor, " batch"]:
        """The reward's scores in fp32. Raises RewardError naming the phase and the cause if the
        last attempt, too, raised, took too long or did not give a finite score for each completion.
        That memory ran out is raised as it is and at once."""
        attempts, wait_s = self._patience.retries + 1, self._patience.wait_s
        for attempt in range(1, attempts + 1):
            try:
                return self._attempt(completions)
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

    def _attempt(self, completions: Completions) -> Float[Tensor, " batch"]:
        try:
            scores = self._ask(completions)
        except RewardError as error:
            raise RewardError(f"{error}{self._hint(error.__cause__)}") from error
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            raise RewardError(f"the reward raised {_told(error)}{self._hint(error)}") from error
        _check(scores, completions)
        return scores

    def _ask(self, completions: Completions) -> Tensor:
        if not self._has_thread:
            return self._reward(completions).float()
        if self._thread is None:
            self._thread = Background("reward call")
        asked = self._thread.submit(lambda: self._reward(completions).float())
        timeout_s = self._patience.timeout_s
        if not wait([asked], timeout_s).done:
            self._thread = None  # lost to the call that hangs
            raise RewardError(
                f"the reward gave no scores within {timeout_s:g} s; if it needs longer, raise"
                " stage.guards.reward_timeout_s or set it null"
            )
        return asked.result()

    def _hint(self, error: BaseException | None) -> str:
        """What to do about an error that only the main thread avoids."""
        if not self._has_thread or "thread" not in str(error):
            return ""
        return (
            "\nthe reward is called on a thread of its own, so that a call that hangs can be given"
            " up; to have it called on the main thread, set stage.guards.reward_timeout_s=null and"
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


def _told(error: BaseException) -> str:
    """The exception, and the innermost line that is no library's."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")
    calls = extract_tb(error.__traceback__)
    own = [call for call in calls if "site-packages" not in Path(call.filename).parts] or calls
    return f"{text} at {own[-1].filename}:{own[-1].lineno}"

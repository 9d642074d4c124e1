"""Rollouts: completions sampled, scored and measured, one batch ahead of learning if asked to."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.rollout.measure import measure
from rlhf_exp.rollout.sampler import have_ended
from rlhf_exp.stages.actors import Actors
from rlhf_exp.stages.evaluation import checked_scores, sample
from rlhf_exp.stages.train_state import TrainState
from rlhf_exp.training.timing import Stopwatch
from rlhf_exp.types import Completions, Generation, Rollout


class Collector:
    """Makes the rollout of each phase.

    With `overlap` the reward scores on a thread while the reference reads the same batch: worth it
    where they compute on different devices. With `ahead` it goes on while the policy samples the
    next batch, which then comes from the policy before the update in between: its ratios start
    beside 1.
    """

    def __init__(
        self,
        actors: Actors,
        *,
        rows: int,
        missing_eos_penalty: float | None,
        overlap: bool = False,
        ahead: bool = False,
    ) -> None:
        self.actors = actors
        self._rows, self._penalty = rows, missing_eos_penalty
        self._thread = ThreadPoolExecutor(1, "reward") if overlap or ahead else None
        self._ahead = ahead
        self._waiting: tuple[Rollout, Callable[[], Tensor]] | None = None

    def collect(self, state: TrainState, lap: Stopwatch, *, another: bool) -> Rollout:
        """The rollout of the state's phase. `another` says that a phase follows before the state
        is saved: a batch sampled ahead is not part of the state."""
        if self._waiting is None:
            self._waiting = self._start(state, state.phase, lap)
        rollout, scores = self._waiting
        self._waiting = None
        if self._ahead and another:
            self._waiting = self._start(state, state.phase + 1, lap)
        with lap("score"):
            return replace(rollout, scores=scores())

    def wait_for_reward(self) -> None:
        """Returns when the thread is idle: a reward need not bear two calls at once, and an
        evaluation calls it too."""
        if self._thread is not None:
            self._thread.submit(lambda: None).result()

    def _start(
        self, state: TrainState, phase: int, lap: Stopwatch
    ) -> tuple[Rollout, Callable[[], Tensor]]:
        """A batch measured by the policy that sampled it, and what gives its scores."""
        policy, sampler = state.policy, self.actors.sampler
        with lap("sample"):
            generation = sample(
                sampler, policy, next(state.prompts), state.sample_generator,
                phase=phase, rows=self._rows,
            )  # fmt: skip
        scores = partial(self._scores, generation.completions, phase)
        if self._thread is not None:
            future: Future[Tensor] = self._thread.submit(scores)
            return self._measured(state, generation, lap), future.result
        return self._measured(state, generation, lap), scores

    def _measured(self, state: TrainState, generation: Generation, lap: Stopwatch) -> Rollout:
        to_come = torch.zeros(len(generation.completions.texts), device=state.policy.device)
        with lap("measure"):
            return measure(
                state.policy, self.actors.reference, generation, to_come,
                temperature=self.actors.sampler.temperature, rows=self._rows,
            )  # fmt: skip

    def _scores(self, completions: Completions, phase: int) -> Float[Tensor, " batch"]:
        scores = checked_scores(self.actors.score, completions, phase=phase)
        if self._penalty is None:
            return scores
        ended = have_ended(completions, self.actors.policy.tokenizer)
        return scores - self._penalty * ~ended

"""Rollouts: completions sampled, scored and measured, one batch ahead of learning if asked to."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.rewards.attempts import ONCE, Patience, PatientReward
from rlhf_exp.rewards.protocol import RewardError
from rlhf_exp.rl.actors import Actors
from rlhf_exp.rl.evaluation import sample
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.measure import measure
from rlhf_exp.rollout.sampler import have_ended
from rlhf_exp.training.background import Background
from rlhf_exp.training.memory import explaining_memory
from rlhf_exp.training.timing import Stopwatch
from rlhf_exp.types import Completions, Generation, PromptBatch, Rollout

log = logging.getLogger(__name__)
SCORING = (
    "lower reward.batch_size (of classifier, pair_model and reward_model)",
    "put the reward on another device (reward.device of classifier and pair_model)",
)


class Collector:
    """Makes the rollout of each phase.

    With `overlap` the reward scores on a thread while the reference reads the same batch: worth it
    where they compute on different devices. With `ahead` it goes on while the policy samples the
    next batch, which then comes from the policy before the update in between: its ratios start
    beside 1. Of a reward that fails in spite of `patience`, the batch's scores are NaN if
    `skip_unscored`.
    """

    def __init__(
        self,
        actors: Actors,
        *,
        rows: int,
        missing_eos_penalty: float | None,
        overlap: bool = False,
        ahead: bool = False,
        patience: Patience = ONCE,
        skip_unscored: bool = False,
    ) -> None:
        self.actors = actors
        self._rows, self._penalty = rows, missing_eos_penalty
        self._thread = Background("reward") if overlap or ahead else None
        self._ahead = ahead
        self.reward = PatientReward(actors.score, patience, on_thread=self._thread is not None)
        self._skip_unscored = skip_unscored
        self._waiting: tuple[Rollout, Callable[[], Tensor]] | None = None

    def collect(self, state: TrainState, lap: Stopwatch, *, another: bool) -> Rollout:
        """The rollout of the state's phase. `another` says that a phase follows."""
        if self._waiting is None:
            self._waiting = self._start(state, state.phase, lap)
        rollout, scores = self._waiting
        self._waiting = None
        if self._ahead and another:
            self._waiting = self._start(state, state.phase + 1, lap)
        with lap("score"):
            return replace(rollout, scores=scores())

    def state_dict(self) -> dict[str, Any]:
        """The batch that was sampled ahead, with its scores, which are waited for, and which of the
        prompts it completes; nothing without one."""
        if self._waiting is None:
            return {}
        rollout = self._settled()
        completions, prompts = rollout.completions, rollout.completions.prompts
        places = {id(row): i for i, row in enumerate(self.actors.train_prompts.rows)}
        measured = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
        del measured["completions"]
        return {
            "measured": measured,
            "completions": {"tokens": completions.tokens, "mask": completions.mask},
            "texts": list(completions.texts),
            "prompts": {"tokens": prompts.tokens, "mask": prompts.mask},
            "rows": [places[id(row)] for row in prompts.rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self._waiting = None
        if not state:
            return
        measured, completions, prompts = (
            {name: tensor.to(self.actors.policy.device) for name, tensor in state[part].items()}
            for part in ("measured", "completions", "prompts")
        )
        rows = tuple(self.actors.train_prompts.rows[i] for i in state["rows"])
        rollout = Rollout(
            completions=Completions(
                prompts=PromptBatch(**prompts, rows=rows),
                **completions,
                texts=tuple(state["texts"]),
            ),
            **measured,
        )
        self._waiting = rollout, lambda: rollout.scores

    def _settled(self) -> Rollout:
        assert self._waiting is not None
        waiting, scores = self._waiting
        rollout = replace(waiting, scores=scores())
        self._waiting = rollout, lambda: rollout.scores
        return rollout

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
        with lap("sample"), self._explaining(f"phase {phase}: sampling"):
            generation = sample(
                sampler, policy, next(state.prompts), state.sample_generator,
                phase=phase, rows=self._rows,
            )  # fmt: skip
        scores = partial(self._scores, generation.completions, phase)
        if self._thread is not None:
            future = self._thread.submit(scores)
            return self._measured(state, generation, phase, lap), future.result
        return self._measured(state, generation, phase, lap), scores

    def _measured(
        self, state: TrainState, generation: Generation, phase: int, lap: Stopwatch
    ) -> Rollout:
        to_come = torch.zeros(len(generation.completions.texts), device=state.policy.device)
        with lap("measure"), self._explaining(f"phase {phase}: measuring the samples"):
            return measure(
                state.policy, self.actors.reference, generation, to_come,
                temperature=self.actors.sampler.temperature, rows=self._rows,
            )  # fmt: skip

    def _explaining(self, doing: str) -> AbstractContextManager[None]:
        knobs = (f"lower stage.rollout_batch_size (now {self._rows})", "lower sampler.gen_len")
        return explaining_memory(doing, knobs)

    def _scores(self, completions: Completions, phase: int) -> Float[Tensor, " batch"]:
        try:
            with explaining_memory(f"phase {phase}: scoring", SCORING):
                scores = self.reward(completions, phase=phase)
        except RewardError as error:
            if not self._skip_unscored:
                raise
            log.warning("%s; nothing is learned from that phase", error)
            return torch.full((len(completions.texts),), math.nan, device=completions.mask.device)
        if self._penalty is None:
            return scores
        ended = have_ended(completions, self.actors.policy.tokenizer)
        return scores - self._penalty * ~ended

"""Steps 1 to 3 with rewards on a thread, failing rewards, and rollouts collected a phase ahead."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.machine.background import Background
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rewards.attempts import CheckedReward
from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rl.guards import Guards
from rlhf_exp.rl.loop import PendingScores
from rlhf_exp.rollout.sampler import Sampler, have_ended
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.training.out_of_memory import explaining_memory
from rlhf_exp.types import Completions, Generation, PromptBatch, Rollout, concatenate

log = logging.getLogger(__name__)
SCORING = (
    "lower reward.batch_size (of classifier, pair_model and reward_model)",
    "put the reward on another device (reward.device of classifier and pair_model)",
)


def sample(
    sampler: Sampler,
    policy: TransformerWithValueHead,
    prompts: PromptBatch,
    generator: torch.Generator,
    *,
    phase: int,
    rows: int | None = None,
) -> Generation:
    """The sampler's generation, `rows` prompts at a time, by default all. Raises TrainingError
    naming the phase if the policy has diverged."""
    row_index = torch.arange(len(prompts.rows), device=prompts.tokens.device)
    try:
        return concatenate(
            [
                sampler(policy, prompts[index] if rows else prompts, generator)
                for index in row_index.split(rows or len(row_index))
            ]
        )
    except TrainingError as error:
        raise TrainingError(f"phase {phase}: {error}") from error


class Scorer:
    """Step 2. With `on_thread` the reward scores on a separate thread. If it fails despite the
    guards' retries, the scores are NaN with on_reward_error="skip". `penalty` [batch] is
    subtracted from the scores."""

    def __init__(
        self,
        reward: RewardFunction,
        guards: Guards,
        *,
        penalty: Callable[[Completions], Tensor] | None,
        on_thread: bool,
    ) -> None:
        self._thread = Background("reward") if on_thread else None
        self.reward = CheckedReward(reward, guards.retry, on_thread=on_thread)
        self._penalty, self._skips = penalty, guards.on_reward_error == "skip"

    def __call__(self, completions: Completions, phase: int) -> PendingScores:
        """Returns a function that blocks until the scores are computed and returns them."""
        if self._thread is not None:
            return self._thread.submit(lambda: self._scores(completions, phase)).result
        scores = self._scores(completions, phase)
        return lambda: scores

    def wait(self) -> None:
        """Returns when the thread is idle: an evaluation calls the reward too, and a reward need
        not support two calls at once."""
        if self._thread is not None:
            self._thread.submit(lambda: None).result()

    def _scores(self, completions: Completions, phase: int) -> Float[Tensor, " batch"]:
        try:
            with explaining_memory(f"phase {phase}: scoring", SCORING):
                scores = self.reward(completions, phase=phase)
        except RewardError as error:
            if not self._skips:
                raise
            log.warning("%s; nothing is learned from that phase", error)
            return torch.full((len(completions.texts),), math.nan, device=completions.mask.device)
        return scores if self._penalty is None else scores - self._penalty(completions)


def missing_eos_penalty(
    tokenizer: PreTrainedTokenizerBase, penalty: float | None
) -> Callable[[Completions], Float[Tensor, " batch"]] | None:
    """Returns the function that computes each completion's penalty for not ending with EOS."""
    if penalty is None:
        return None
    return lambda completions: penalty * ~have_ended(completions, tokenizer)


class Rollouts:
    """The rollout of each phase. With `ahead` the next rollout is sampled before this phase's
    update, while the reward scores this one; its first ratios are then near 1, not exactly 1."""

    def __init__(
        self,
        collect: Callable[[int], tuple[Rollout, PendingScores]],
        prompts: PromptBatch,
        *,
        ahead: bool,
        total_phases: int,
    ) -> None:
        self._collect, self._prompts, self._ahead = collect, prompts, ahead
        self.total_phases = total_phases
        self._next: tuple[Rollout, PendingScores] | None = None

    def __call__(self, phase: int) -> Rollout:
        """The phase's rollout with its scores."""
        rollout, scores = self._next or self._collect(phase)
        self._next = None
        if self._ahead and phase < self.total_phases:
            self._next = self._collect(phase + 1)
        return replace(rollout, scores=scores())

    def state_dict(self) -> dict[str, Any]:
        """The rollout collected ahead, once its scores are computed; {} if there is none."""
        if self._next is None:
            return {}
        rollout = replace(self._next[0], scores=self._next[1]())
        self._next = rollout, lambda: rollout.scores
        completions, prompts = rollout.completions, rollout.completions.prompts
        # A row is saved as its index in the task, since rows may be equal.
        places = {id(row): i for i, row in enumerate(self._prompts.rows)}
        return {
            "rollout": _tensors(rollout),
            "completions": _tensors(completions),
            "prompts": _tensors(prompts),
            "texts": list(completions.texts),
            "rows": [places[id(row)] for row in prompts.rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next = None
        if not state:
            return
        device = self._prompts.tokens.device
        rollout, completions, prompts = (
            {name: tensor.to(device) for name, tensor in state[part].items()}
            for part in ("rollout", "completions", "prompts")
        )
        rows = tuple(self._prompts.rows[i] for i in state["rows"])
        whole = Rollout(
            completions=Completions(
                prompts=PromptBatch(rows=rows, **prompts),
                texts=tuple(state["texts"]),
                **completions,
            ),
            **{"values": None, **rollout},  # a rollout may be saved without values
        )
        self._next = whole, lambda: whole.scores


def _tensors(record: Any) -> dict[str, Tensor]:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}

"""The state of PPO that changes from phase to phase."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rl.averaging import WeightAverage
from rlhf_exp.rl.collapse import CollapseMonitor
from rlhf_exp.tasks.prompts import PromptStream
from rlhf_exp.training.optim import (
    load_optimizer_state,
    load_trained_state,
    optimizer_state,
    trained_state,
)
from rlhf_exp.training.saver import check_inputs

# Fields that a checkpoint holds as they are.
PLAIN = (
    "phase", "best_score", "best_phase", "kl_coef", "skipped_steps", "skipped_rewards", "stopped",
    "kl_sum_at_stop",
)  # fmt: skip


@dataclass(kw_only=True)
class TrainState:
    """Everything that changes from phase to phase. Only the policy's trained weights are saved."""

    policy: TransformerWithValueHead
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    prompts: PromptStream
    sample_generator: torch.Generator
    minibatch_generator: torch.Generator
    inputs: Mapping[str, str]
    """The hash of each part's files; a resumed run must find the same hashes."""
    average: WeightAverage | None = None
    """The averaged weights, which evaluations and the saved model have; None: the policy's own."""
    phase: int = 0
    best_score: float | None = None
    """The highest eval/score so far."""
    best_phase: int = 0
    kl_coef: float | None = None
    """The adapted coefficient; None until it was first adapted."""
    skipped_steps: int = 0
    skipped_rewards: int = 0
    credit_memory: dict[str, float] = field(default_factory=dict)
    """Numbers that the estimator keeps from phase to phase."""
    stopped: str | None = None
    """Why the run ended before its last phase."""
    kl_sum_at_stop: float | None = None
    """objective/kl_sum (nats a completion) when it passed max_kl_sum."""
    collapse: CollapseMonitor = field(default_factory=CollapseMonitor)
    seconds: dict[str, float] = field(default_factory=dict)
    """What the run has taken so far, by part."""

    def state_dict(self) -> dict[str, Any]:
        """Trained parameters, moments, positions of the prompts and generators, and the rest."""
        return {
            "policy": trained_state(self.policy),
            "average": {} if self.average is None else self.average.weights,
            "optimizer": optimizer_state(self.optimizer),
            "prompts": self.prompts.state_dict(),
            "generators": {name: g.get_state() for name, g in self._generators().items()},
            "inputs": dict(self.inputs),
            "collapse": asdict(self.collapse),
            "credit_memory": dict(self.credit_memory),
            "seconds": dict(self.seconds),
            **{name: getattr(self, name) for name in PLAIN},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state. Raises ConfigError if it belongs to another model or other inputs."""
        check_inputs(self.inputs, state["inputs"])
        load_trained_state(self.policy, state["policy"])
        if self.average is not None:
            self.average.restore(state["average"])
        for name in PLAIN:
            setattr(self, name, state[name])
        load_optimizer_state(self.optimizer, self.scheduler, state["optimizer"], step=self.phase)
        self.prompts.load_state_dict(state["prompts"])
        for name, generator in self._generators().items():
            generator.set_state(state["generators"][name])
        self.collapse = CollapseMonitor(**state["collapse"])
        self.credit_memory = dict(state["credit_memory"])
        self.seconds.update(state["seconds"])

    def trained_weights(self) -> Mapping[str, Tensor]:
        """The trained weights by name, as they are evaluated and saved; not copied."""
        return trained_state(self.policy) if self.average is None else self.average.weights

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """The context in which the policy has the weights that are evaluated and saved."""
        return nullcontext() if self.average is None else self.average.applied()

    def record_evaluation(self, score: float) -> bool:
        """Records the score of an evaluation after this phase. Returns True if it is the best."""
        is_best = self.best_score is None or score > self.best_score
        if is_best:
            self.best_score, self.best_phase = score, self.phase
        return is_best

    def _generators(self) -> dict[str, torch.Generator]:
        return {"samples": self.sample_generator, "minibatches": self.minibatch_generator}


def evaluated_weights_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The trained weights in a `state_dict`, as they are evaluated and saved."""
    return dict(state["average"] or state["policy"])

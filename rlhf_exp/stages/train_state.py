"""What changes from phase to phase of PPO, all in one place."""

from dataclasses import dataclass

import torch

from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.training.optim import AdamWSettings, Schedule
from rlhf_exp.training.seeding import stream


@dataclass(kw_only=True)
class TrainState:
    """Everything that changes from phase to phase."""

    policy: TransformerWithValueHead
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    sample_generator: torch.Generator
    minibatch_generator: torch.Generator
    prompt_generator: torch.Generator
    phase: int = 0

    @classmethod
    def start(
        cls,
        policy: TransformerWithValueHead,
        optimizer: AdamWSettings,
        schedule: Schedule,
        *,
        total_phases: int,
        seed: int,
    ) -> "TrainState":
        """The state before the first phase."""
        adamw = optimizer.build(policy.language_model, policy.value_head)
        return cls(
            policy=policy,
            optimizer=adamw,
            scheduler=schedule.build(adamw, total_steps=total_phases),
            sample_generator=stream(seed, "samples", policy.device),
            minibatch_generator=stream(seed, "minibatches"),
            prompt_generator=stream(seed, "prompts"),
        )

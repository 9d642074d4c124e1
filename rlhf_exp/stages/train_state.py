"""What changes from phase to phase of PPO, all in one place."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.prompts import PromptStream
from rlhf_exp.training.checkpoint import read_newest_checkpoint, write_checkpoint
from rlhf_exp.training.collapse import Watch
from rlhf_exp.training.optim import AdamWSettings, Schedule
from rlhf_exp.training.seeding import stream
from rlhf_exp.types import PromptBatch


@dataclass(kw_only=True)
class TrainState:
    """Everything that changes from phase to phase. What of the policy is not trained is as the
    model's own files have it. `kl_coef` is what the controller has made of the stage's, None before
    it has; `stopped` says why no phase follows although more were asked for; `seconds` are what the
    run took so far, by part."""

    policy: TransformerWithValueHead
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    prompts: PromptStream
    sample_generator: torch.Generator
    minibatch_generator: torch.Generator
    inputs: Mapping[str, str]
    phase: int = 0
    kl_coef: float | None = None
    skipped_steps: int = 0
    skipped_rewards: int = 0
    stopped: str | None = None
    watch: Watch = field(default_factory=Watch)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        policy: TransformerWithValueHead,
        optimizer: AdamWSettings,
        schedule: Schedule,
        prompts: PromptBatch,
        *,
        batch_size: int,
        total_phases: int,
        seed: int,
        inputs: Mapping[str, str],
    ) -> "TrainState":
        """The state before the first phase. `inputs` are hashes of what a resumed run must find as
        it was, by the field that names it."""
        adamw = optimizer.build(policy.language_model, policy.value_head)
        return cls(
            policy=policy,
            optimizer=adamw,
            scheduler=schedule.build(adamw, total_steps=total_phases),
            prompts=PromptStream(prompts, batch_size, stream(seed, "prompts")),
            sample_generator=stream(seed, "samples", policy.device),
            minibatch_generator=stream(seed, "minibatches"),
            inputs=inputs,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, not copied."""
        found: dict[str, Tensor] = {f"policy.{name}": p for name, p in self._trained().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        found |= {f"prompts.{name}": tensor for name, tensor in self.prompts.state().items()}
        found["generators.samples"] = self.sample_generator.get_state()
        found["generators.minibatches"] = self.minibatch_generator.get_state()
        return found

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, as JSON holds it."""
        return {
            "phase": self.phase,
            "optimizer": self.optimizer.state_dict()["param_groups"],
            "scheduler": self.scheduler.state_dict(),
            "inputs": dict(self.inputs),
            "kl_coef": self.kl_coef,
            "skipped_steps": self.skipped_steps,
            "skipped_rewards": self.skipped_rewards,
            "stopped": self.stopped,
            "watch": asdict(self.watch),
            "seconds": self.seconds,
        }

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Makes this the state that `tensors` and `numbers` were taken of. Raises ConfigError if
        they are of another model."""
        for where, known in numbers["inputs"].items():
            if self.inputs.get(where) != known:
                raise ConfigError(
                    f"{where}: what it names has changed since the checkpoint; bring it back, or"
                    " start the run again"
                )
        trained = self._trained()
        saved = {
            n.removeprefix("policy."): t for n, t in tensors.items() if n.startswith("policy.")
        }
        if {n: p.shape for n, p in trained.items()} != {n: t.shape for n, t in saved.items()}:
            raise ConfigError(
                "the checkpoint is of a model with other trained weights; the run's model has"
                " changed since"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, moment = rest.partition(".")
                moments.setdefault(int(index), {})[moment] = tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": numbers["optimizer"]})
        self.scheduler.load_state_dict(dict(numbers["scheduler"]))
        self.prompts.restore({n: tensors[f"prompts.{n}"] for n in ("pending", "generator")})
        self.sample_generator.set_state(tensors["generators.samples"])
        self.minibatch_generator.set_state(tensors["generators.minibatches"])
        self.phase = numbers["phase"]
        self.kl_coef = numbers["kl_coef"]
        self.skipped_steps = numbers["skipped_steps"]
        self.skipped_rewards = numbers["skipped_rewards"]
        self.stopped = numbers["stopped"]
        self.watch = Watch(**numbers["watch"])
        self.seconds.update(numbers.get("seconds", {}))

    def save(self, run: Path) -> None:
        """Writes a checkpoint below the run's folder."""
        write_checkpoint(run, self.phase, self.tensors(), self.numbers())

    def load(self, run: Path) -> None:
        """Makes this the state of the run's newest checkpoint. Raises ConfigError as `restore`
        and `read_newest_checkpoint` do."""
        self.restore(*read_newest_checkpoint(run))

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.policy.named_parameters() if p.requires_grad}

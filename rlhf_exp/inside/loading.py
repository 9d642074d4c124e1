"""The models of a run: the base that it began with, and the policy at the end or after any phase
of which the run kept a snapshot or a checkpoint.

Knows a run's configuration and how its weights were kept. Every model is plain: adapters are
merged.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_exp.app.instantiate import ALLOWED_TARGETS, instantiate
from rlhf_exp.hf import PreTrainedModel, TransformerBridge
from rlhf_exp.models.hooked import boot_bridge
from rlhf_exp.models.loading import Pretrained, build_policy
from rlhf_exp.models.lora import adapter_deltas
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import reference_hash
from rlhf_exp.rl.state import evaluated_weights_of
from rlhf_exp.runs.checkpoint import checkpoint_phases, read_checkpoint_of
from rlhf_exp.runs.context import pick_device
from rlhf_exp.runs.paths import MODEL, read_resolved_config, read_result
from rlhf_exp.runs.snapshots import read_snapshot, snapshot_phases
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.tasks.encoding import tokenizer_factory
from rlhf_exp.training.saver import join_state
from rlhf_exp.training.seeding import stream_seed

log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """The policy before training, and after it or after one of its phases."""

    base: TransformerWithValueHead
    tuned: TransformerWithValueHead


class Bridges(NamedTuple):
    """A pair as TransformerBridges with one tokenizer and equal settings."""

    base: TransformerBridge
    tuned: TransformerBridge


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run's folder and configuration. Code that came with a model is trusted only if the run and
    the caller trust it; `allow_targets` are modules besides this package that the configuration may
    name."""

    folder: Path
    config: Mapping[str, Any]
    device: torch.device
    trust_remote_code: bool
    allow_targets: tuple[str, ...]

    def part(self, name: str) -> Any:
        """The settings of a group, such as task. Raises ConfigError if they cannot be built."""
        config = dict(self.config.get(name) or {})
        if name == "model" and "base_model" in config:
            config |= {"trust_remote_code": self._trusts_model, "fetch": False}
        problems: list[str] = []
        allowed = (*ALLOWED_TARGETS, *(f"{module}." for module in self.allow_targets))
        part = instantiate(config, name, problems, allowed=allowed)
        if problems:
            raise ConfigError(f"{self.folder}: {'; '.join(problems)}")
        return part

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    def base(self) -> TransformerWithValueHead:
        """The policy as it was before training, its value head included. Raises ConfigError if the
        base model is gone or has changed since."""
        policy = self.untrained()
        try:
            expected = read_result(self.folder).get("reference_sha256")
        except (OSError, ValueError):
            return policy  # the run is not done
        if expected is not None and reference_hash(policy, policy) != expected:
            raise ConfigError(
                f"{self.folder}: its base model has changed since the run, so that no difference"
                " would be the training's; bring the old one back"
            )
        return policy

    def tuned(self, phase: int | None) -> TransformerWithValueHead:
        """The policy after a phase; None: the saved model. Raises ConfigError, naming the phases
        that there are, if the run did not keep it."""
        if phase is not None:
            policy = self.untrained()
            self.put_weights(policy, phase, base=policy)
            return policy
        if not (self.folder / MODEL).is_dir():
            raise ConfigError(
                f"{self.folder} has no saved model: the run is not done; {self._what_is_kept()}"
            )
        saved = Pretrained(base_model=str(self.folder), trust_remote_code=self._trusts_model)
        return build_policy(
            saved,
            None,
            device=self.device,
            seed=self.seed,
            value_head=self._value_model == "shared",
        )

    @torch.no_grad()
    def put_weights(
        self, policy: TransformerWithValueHead, phase: int, *, base: TransformerWithValueHead
    ) -> None:
        """Gives an untrained policy the weights of a phase. `base` has the untrained weights, to
        which adapters are added; it may be the policy itself. Raises ConfigError as `tuned` does,
        and if the weights are of another model."""
        weights = self._weights(phase)
        if any(weight.dtype == torch.bfloat16 for weight in weights.values()):
            log.warning("%s: the snapshot of phase %d is bf16, whose rounding looks like a change"
                        " of weights", self.folder, phase)  # fmt: skip
        adapters = {name: weights.pop(name) for name in [*weights] if "lora_" in name}
        if policy.value_trunk is None and any(n.startswith("value_trunk.") for n in weights):
            policy.separate_values()
        _copy(weights, dict(policy.named_parameters()), source=self.folder)
        if not adapters:
            return
        plain, model = base.language_model, policy.language_model
        adapted = self._adapted(plain)
        named = {f"language_model.{n}": p for n, p in adapted.named_parameters()}
        _copy(adapters, named, source=self.folder)
        for name, delta in adapter_deltas(adapted):
            matrix = plain.get_parameter(name)
            model.get_parameter(name).copy_(matrix.float() + delta.float())

    def _adapted(self, plain: PreTrainedModel) -> PreTrainedModel:
        """The model with the run's adapters; it shares every tensor of the plain one."""
        shared = {id(t): t for t in (*plain.parameters(), *plain.buffers())}
        adapted = copy.deepcopy(plain, shared)
        self.part("finetune").select(adapted)
        plain.requires_grad_(True)  # the choice of what is trained froze the shared tensors
        return adapted

    @property
    def _trusts_model(self) -> bool:
        return self.trust_remote_code and bool(self.config["model"].get("trust_remote_code"))

    @property
    def _value_model(self) -> str | None:
        """shared or separate; None for a run without values."""
        stage = self.part("stage")
        if not isinstance(stage, PPO) or not stage.estimator.needs_values:
            return None
        return stage.value_model

    def untrained(self) -> TransformerWithValueHead:
        """The policy of the run's settings, without a check that it is the one that was trained."""
        model = self.part("model")
        make_tokenizer = None
        if not isinstance(model, Pretrained):
            make_tokenizer = tokenizer_factory(self.part("task"))
        return build_policy(
            model,
            make_tokenizer,
            device=self.device,
            seed=stream_seed(self.seed, "model"),
            value_head=self._value_model is not None,
        )

    def _weights(self, phase: int) -> dict[str, Tensor]:
        if phase in snapshot_phases(self.folder):
            return read_snapshot(self.folder, phase)
        if phase in checkpoint_phases(self.folder):
            checkpoint = join_state(*read_checkpoint_of(self.folder, phase))
            return evaluated_weights_of(checkpoint["state"]["loop"])
        raise ConfigError(f"{self.folder} kept no weights of phase {phase}; {self._what_is_kept()}")

    def _what_is_kept(self) -> str:
        kept = {
            "snapshots": snapshot_phases(self.folder), "checkpoints": checkpoint_phases(self.folder)
        }  # fmt: skip
        lists = [
            f"{kind} of phases {', '.join(map(str, phases))}"
            for kind, phases in kept.items()
            if phases
        ]
        if lists:
            return f"it has {' and '.join(lists)}"
        return "it has neither snapshots nor checkpoints: a run with stage.snapshots=log keeps them"


def _copy(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, source: Path) -> None:
    for name, weight in weights.items():
        if name not in parameters or parameters[name].shape != weight.shape:
            raise ConfigError(f"{source}: its {name} does not fit its base model")
        parameters[name].copy_(weight)


def open_run(
    run: str | Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_targets: Sequence[str] = (),
) -> TrainedRun:
    """The run in a folder. Raises ConfigError if no run has begun there, and for a run whose stage
    trains no language model."""
    folder = Path(run).expanduser()
    try:
        config = read_resolved_config(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{run} is not the folder of a run: resolved_config.json is missing or broken"
        ) from error
    if not config.get("model") or not config.get("finetune"):
        raise ConfigError(f"{run}: its stage finetunes no language model")
    if len(config.get("intervention") or {}) > 1:  # more than its class
        log.warning("%s was trained under an intervention; these models do not have it", run)
    return TrainedRun(
        folder=folder,
        config=config,
        device=pick_device(device),
        trust_remote_code=trust_remote_code,
        allow_targets=tuple(allow_targets),
    )


Run = str | Path | TrainedRun
"""A run's folder, or what `open_run` makes of it."""


def _opened(run: Run) -> TrainedRun:
    return run if isinstance(run, TrainedRun) else open_run(run)


def load_policy(run: Run, phase: int | None = None) -> TransformerWithValueHead:
    """The policy of a run after a phase; None: at its end. Raises ConfigError, naming the phases
    that there are, for one that the run did not keep."""
    return _opened(run).tuned(phase)


def load_pair(run: Run, phase: int | None = None) -> Pair:
    """The policy of a run before training, and after a phase or at its end. Raises ConfigError as
    `load_policy` does, and if the base model is gone or has changed."""
    opened = _opened(run)
    tuned = opened.tuned(phase)  # first: it raises for a wrong phase
    return Pair(base=opened.base(), tuned=tuned)


def load_bridges(run: Run, phase: int | None = None) -> Bridges:
    """`load_pair` as TransformerBridges in evaluation mode, with one tokenizer. Raises ConfigError
    also for an architecture that TransformerLens does not support."""
    pair = load_pair(run, phase)
    base, tuned = (boot_bridge(p.language_model, pair.base.tokenizer) for p in pair)
    tuned.tokenizer = base.tokenizer
    return Bridges(base=base, tuned=tuned)


def trajectory(run: Run) -> Iterator[tuple[int, Pair]]:
    """The pairs of all snapshots, by phase. Each step gives the same two modules, the tuned one
    with other weights: copy what is to stay. Raises ConfigError for a run without snapshots."""
    opened = _opened(run)
    phases = snapshot_phases(opened.folder)
    if not phases:
        raise ConfigError(
            f"{opened.folder} has no snapshots: set stage.snapshots=log for the next run"
        )
    base, tuned = opened.base(), opened.untrained()
    for phase in phases:
        opened.put_weights(tuned, phase, base=base)
        yield phase, Pair(base=base, tuned=tuned)

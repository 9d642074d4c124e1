"""The optimizer group: AdamW over a base and a head, and the state of what it trains."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_exp.settings import (
    BelowOne,
    ConfigError,
    NonNegative,
    Positive,
    settings,
)


@settings
class AdamWSettings:
    """AdamW with one learning rate for the base model and one for the head.

    Weight decay applies to the base model's parameters with two or more axes: not to biases, layer
    norms and the head.
    """

    base_lr: NonNegative = 3e-4
    """Learning rate of the base model: 1e-5 (gpt2-medium) to 3e-3 (pretraining a tiny model)."""
    head_lr: NonNegative = 1e-3
    """Learning rate of the value head, or of a classifier's head."""
    beta1: BelowOne = 0.9
    """Decay of the first moment."""
    beta2: BelowOne = 0.999
    """Decay of the second moment."""
    eps: Positive = 1e-5
    """1e-8 is PyTorch's default; 1e-5 is PPO's custom."""
    weight_decay: NonNegative = 0.0
    """Weight decay of the base model's matrices, 0-0.1."""

    def build(self, base: nn.Module, head: nn.Module | None = None) -> torch.optim.AdamW:
        """The optimizer; its groups are named "base" or "head"."""
        of_head = {id(p) for p in head.parameters()} if head is not None else set()
        trained = [p for p in base.parameters() if p.requires_grad and id(p) not in of_head]
        groups = [
            self._group("base", (p for p in trained if p.ndim >= 2), self.base_lr, decay=True),
            self._group("base", (p for p in trained if p.ndim < 2), self.base_lr, decay=False),
        ]
        if head is not None:
            groups.append(self._group("head", head.parameters(), self.head_lr, decay=False))
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )

    def _group(
        self, name: str, parameters: Iterable[nn.Parameter], lr: float, *, decay: bool
    ) -> dict[str, object]:
        return {
            "name": name,
            "params": list(parameters),
            "lr": lr,
            "weight_decay": self.weight_decay if decay else 0.0,
        }


def clip_gradients(
    optimizer: torch.optim.Optimizer, max_norm: float
) -> dict[str, Float[Tensor, ""]]:
    """Clips the total gradient norm of all groups to `max_norm`; returns the norms before clipping,
    by group name."""
    by_name: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        by_name.setdefault(group["name"], []).extend(gradients)
    norms = {name: torch.nn.utils.get_total_norm(grads) for name, grads in by_name.items()}
    total = torch.stack(list(norms.values())).norm()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return norms


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The moments and the step count of each parameter, by its index; not copied."""
    return {str(index): moments for index, moments in optimizer.state_dict()["state"].items()}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    state: Mapping[str, Mapping[str, Tensor]],
    *,
    step: int,
) -> None:
    """Restores `state` and sets the scheduler to `step`. Base rates and other settings stay as
    built."""
    moments = {int(index): dict(tensors) for index, tensors in state.items()}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    # As after `step` calls of scheduler.step().
    scheduler.load_state_dict(
        {**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1}
    )
    multipliers = [multiplier(step) for multiplier in scheduler.lr_lambdas]
    for group, base, factor in zip(
        optimizer.param_groups, scheduler.base_lrs, multipliers, strict=True
    ):
        group["lr"] = base * factor


def trained_state(network: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name; not copied."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def load_trained_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies a `trained_state` into the network. Raises ConfigError, before it changes anything, if
    names or shapes differ."""
    trained = trained_state(network)
    if {n: p.shape for n, p in trained.items()} != {n: t.shape for n, t in state.items()}:
        raise ConfigError(
            "the checkpoint is of a model with other trained weights; the run's model has changed"
            " since"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state[name])


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate of each group, by group name."""
    return {group["name"]: group["lr"] for group in optimizer.param_groups}

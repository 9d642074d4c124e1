"""What of the policy is trained, and what it is held close to: the frozen reference.

The choices differ in memory alone: each reference is the policy as it was before training.
"""

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.functional.vocab_head import Head
from rlhf_exp.models.freezing import train_last_layers
from rlhf_exp.models.loading import ModelSettings, must_be_fp32
from rlhf_exp.models.lora import adapter_off, add_adapter, plain_name
from rlhf_exp.models.policy import CausalTransformer, TransformerWithValueHead
from rlhf_exp.models.working_weights import round_frozen
from rlhf_exp.settings import ConfigError, Count, Text, settings
from rlhf_exp.types import Completions, Layout


@runtime_checkable
class Reference(Protocol):
    """A language model that nothing trains."""

    def completion_states(
        self, completions: Completions, layout: Layout
    ) -> Float[Tensor, "batch num_columns d_model"]:
        """The final hidden states of the positions before each token."""
        ...

    def unembed(self, hidden: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes vocab"]:
        """Logits from final hidden states."""
        ...

    @property
    def head(self) -> Head:
        """The output embedding's weights."""
        ...


@runtime_checkable
class ReferenceSettings(Protocol):
    """The settings of a reference group."""

    def check(self, model: ModelSettings) -> list[str]:
        """What is wrong between this choice and the model's settings."""
        ...

    def attach(self, policy: TransformerWithValueHead, *, seed: int) -> Reference:
        """Makes trainable what this choice trains, and returns the policy as it is now, frozen.
        Raises ConfigError for a model that it does not fit."""
        ...


@settings
class FullCopy:
    """All weights are trained; the reference is a copy of them."""

    def check(self, model: ModelSettings) -> list[str]:
        """The weights must be fp32."""
        return must_be_fp32(model)

    def attach(self, policy: TransformerWithValueHead, *, seed: int) -> Reference:
        """The copy."""
        return policy.frozen_reference()


@settings
class SharedTrunk:
    """The last `num_layers_unfrozen` blocks and the final layer norm are trained; the reference is
    a copy of these on top of the frozen others, which both share."""

    num_layers_unfrozen: Count = 2

    def check(self, model: ModelSettings) -> list[str]:
        """The weights must be fp32."""
        return must_be_fp32(model)

    def attach(self, policy: TransformerWithValueHead, *, seed: int) -> Reference:
        """The reference, which owns only what is trained in the policy."""
        model = policy.language_model
        try:
            train_last_layers(
                model, self.num_layers_unfrozen, field="reference.num_layers_unfrozen"
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        frozen = [p for p in model.parameters() if not p.requires_grad]
        shared = {id(tensor): tensor for tensor in (*frozen, *model.buffers())}
        return policy.frozen(copy.deepcopy(model, shared))


@settings
class Lora:
    """Low-rank adapters are trained; the reference is the policy with them switched off."""

    rank: Count = 16
    alpha: Count = 32
    target_modules: Text | list[Text] = "all-linear"

    def check(self, model: ModelSettings) -> list[str]:
        """TransformerLens does not know adapters."""
        if model.engine == "hooked":
            return [
                "reference=lora needs model.engine=fast; policy.hooked() shows the merged model"
            ]
        return []

    def attach(self, policy: TransformerWithValueHead, *, seed: int) -> Reference:
        """The policy with its adapters off."""
        try:
            add_adapter(
                policy.language_model,
                rank=self.rank,
                alpha=self.alpha,
                target_modules=self.target_modules,
                seed=seed,
            )
        except ValueError as error:
            reason = str(error).splitlines()[0][:300]
            raise ConfigError(
                f"reference.target_modules={self.target_modules}: {reason}"
            ) from error
        return WithoutAdapter(policy)


class WithoutAdapter:
    """A policy as it was before its adapters; it owns no weights."""

    def __init__(self, policy: CausalTransformer) -> None:
        self._policy = policy

    def completion_states(
        self, completions: Completions, layout: Layout
    ) -> Float[Tensor, "batch num_columns d_model"]:
        """The policy's, adapters and intervention switched off."""
        with adapter_off(self._policy.language_model), self._policy.edits.off():
            return self._policy.completion_states(completions, layout)

    def unembed(self, hidden: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes vocab"]:
        """Logits from final hidden states; the output embedding has no adapter."""
        return self._policy.unembed(hidden)

    @property
    def head(self) -> Head:
        """The policy's."""
        return self._policy.head


def compute_reference_in(
    reference: Reference, policy: CausalTransformer, dtype: torch.dtype
) -> None:
    """Has the reference compute as the policy does, so that their KL is 0 where their weights are
    equal. It keeps its own matrices as they are computed with; the policy's stay."""
    if not isinstance(reference, CausalTransformer):
        return  # it is the policy
    if dtype != torch.float32:
        round_frozen(
            reference.language_model,
            dtype,
            besides=reference.head.weight,
            shared={id(p) for p in policy.parameters()},
        )
        reference.low = dtype


def reference_hash(reference: Reference, policy: CausalTransformer) -> str:
    """The SHA-256 of the reference's weights by name, its output embedding's among them. It is the
    same for all three kinds on one model, before `compute_reference_in`. One weight at a time is
    copied."""
    model = reference if isinstance(reference, CausalTransformer) else policy
    digest = hashlib.sha256()
    weights = {
        plain_name(name): weight.detach()
        for name, weight in model.language_model.named_parameters()
        if "lora_" not in name
    }
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype}\n".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that stay from phase to phase: the policy's weights with its value head and the copies
    that passes in bf16 compute with, what the reference adds to them, and gradients and Adam's two
    moments of what is trained."""

    policy: int
    reference: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.policy + self.reference + self.gradients + self.optimizer

    def __str__(self) -> str:
        parts = {"weights": self.policy, "reference": self.reference, "gradients": self.gradients}
        parts |= {"Adam": self.optimizer, "total": self.total}
        return "memory in MiB: " + "  ".join(f"{k} {v / 2**20:.1f}" for k, v in parts.items())


def resident_memory(policy: TransformerWithValueHead, reference: Reference) -> Memory:
    """The bytes of the policy and its reference; memory that both share counts once."""
    own = _storages((*policy.parameters(), *policy.working_copies()))
    others = {}
    if isinstance(reference, CausalTransformer):
        others = _storages(reference.parameters())
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    return Memory(
        policy=sum(own.values()),
        reference=sum(size for key, size in others.items() if key not in own),
        gradients=trained,
        optimizer=2 * trained,
    )


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}

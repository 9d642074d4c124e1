"""The frozen reference: the policy before training, to which the KL is measured."""

import hashlib
from collections.abc import Iterable, Set
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_exp.hf import Cache
from rlhf_exp.kernels.vocab_head import Head
from rlhf_exp.kernels.working_weights import round_frozen
from rlhf_exp.models.lora import adapter_off, plain_name
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.types import Completions, Layout


class WithoutAdapter:
    """A policy without its adapters; it owns no weights."""

    def __init__(self, policy: CausalTransformer) -> None:
        self._policy = policy

    def hidden_states(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch _"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """The policy's, with adapters and intervention switched off."""
        with adapter_off(self._policy.language_model), self._policy.edits.off():
            return self._policy.hidden_states(tokens, mask, cache)

    def completion_states(
        self, completions: Completions, layout: Layout
    ) -> Float[Tensor, "batch num_columns d_model"]:
        """The policy's, with adapters and intervention switched off."""
        with adapter_off(self._policy.language_model), self._policy.edits.off():
            return self._policy.completion_states(completions, layout)

    def unembed(self, hidden: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes vocab"]:
        """Logits from final hidden states; the output embedding has no adapter."""
        return self._policy.unembed(hidden)

    @property
    def head(self) -> Head:
        """The policy's output embedding."""
        return self._policy.head


Reference = CausalTransformer | WithoutAdapter
"""A frozen language model."""


def compute_reference_in(
    reference: Reference, policy: CausalTransformer, dtype: torch.dtype
) -> None:
    """Casts the reference to the policy's compute dtype, so that equal weights give a KL of exactly
    0. The policy's own matrices keep their dtype."""
    if isinstance(reference, CausalTransformer):  # otherwise it is the policy
        compute_frozen_in(reference, dtype, shared={id(p) for p in policy.parameters()})


def compute_frozen_in(
    model: CausalTransformer, dtype: torch.dtype, *, shared: Set[int] = frozenset()
) -> None:
    """Casts the matrices of a frozen model to `dtype` and runs its passes in it, as
    `CausalTransformer.compute_in` does with trained weights. Weights whose id is in `shared` keep
    their dtype."""
    if dtype != torch.float32:
        round_frozen(model.language_model, dtype, excluded=model.head.weight, shared=shared)
        model.autocast_dtype = dtype


def reference_hash(reference: Reference, policy: CausalTransformer) -> str:
    """The SHA-256 of the names and values of the reference's weights. For one model it is the same
    with full, last_layers and lora, before `compute_reference_in`. Copies one weight at a time."""
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
    """Bytes in use in every phase: the policy's weights with value head and bf16 copies, weights
    that only the reference has, and gradients and Adam's two moments of the trained weights."""

    policy: int
    reference: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.policy + self.reference + self.gradients + self.optimizer

    def __str__(self) -> str:
        parts = {"weights": self.policy, "reference": self.reference, "gradients": self.gradients}
        parts |= {"Adam": self.optimizer, "total": self.total}
        return "memory in MiB: " + "  ".join(f"{k} {v / 2**20:.1f}" for k, v in parts.items())


def resident_memory(policy: TransformerWithValueHead, reference: Reference) -> Memory:
    """The memory of policy and reference; memory that they share counts for the policy."""
    of_policy = _storages((*policy.parameters(), *policy.working_copies()))
    of_reference = {}
    if isinstance(reference, CausalTransformer):
        of_reference = _storages(reference.parameters())
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    return Memory(
        policy=sum(of_policy.values()),
        reference=sum(size for key, size in of_reference.items() if key not in of_policy),
        gradients=trained,
        optimizer=2 * trained,
    )


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}

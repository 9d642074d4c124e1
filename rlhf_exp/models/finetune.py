"""Choices of the weights to train, each with its frozen reference. Whatever the choice, the
reference computes the same numbers as the policy before training."""

from typing import Protocol, runtime_checkable

from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.models.engines import ENGINES
from rlhf_exp.models.freezing import freeze_first_layers
from rlhf_exp.models.loading import ModelSettings
from rlhf_exp.models.lora import add_adapter
from rlhf_exp.models.model_checks import must_be_fp32
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import Reference, WithoutAdapter
from rlhf_exp.settings import ConfigError, Count, Text, settings


@runtime_checkable
class Finetune(Protocol):
    """The settings of a finetune group: which weights are trained. The reference follows."""

    def check(self, model: ModelSettings) -> list[str]:
        """Messages about settings of the model that exclude this choice."""
        ...

    def select(self, language_model: PreTrainedModel) -> None:
        """Marks the weights to train of a model that may be without weights, as one on the meta
        device is. Raises ConfigError for a model that does not fit."""
        ...

    def attach(self, policy: TransformerWithValueHead, *, seed: int) -> Reference:
        """Marks the weights to train, and returns the current policy as a frozen reference. Raises
        ConfigError for a model that does not fit."""
        ...


@settings
class Full:
    """Trains all weights; the reference is a copy of them."""

    def check(self, model: ModelSettings) -> list[str]:
        return must_be_fp32(model)

    def select(self, language_model: PreTrainedModel) -> None:
        pass

    def attach(self, policy: TransformerWithValueHead, *, seed: int) -> Reference:
        return policy.frozen_reference()


@settings
class LastLayers:
    """Trains the last blocks and the final layer norm; the reference is a copy of these and shares
    the frozen blocks with the policy."""

    num_layers_unfrozen: Count = 2
    """Number of trained blocks, counted from the last; 1 to all of them."""

    def check(self, model: ModelSettings) -> list[str]:
        return must_be_fp32(model)

    def select(self, language_model: PreTrainedModel) -> None:
        field = "finetune.num_layers_unfrozen"
        freeze_first_layers(language_model, self.num_layers_unfrozen, field=field)

    def attach(self, policy: TransformerWithValueHead, *, seed: int) -> Reference:
        self.select(policy.language_model)
        return policy.frozen_reference()


@settings
class Lora:
    """Trains low-rank adapters (PEFT); the reference is the policy with them switched off."""

    rank: Count = 16
    """Rank of each adapter, 4-64."""
    alpha: Count = 32
    """The adapter's output is scaled by alpha/rank; mostly 1 to 2 times rank."""
    target_modules: Text | list[Text] = "all-linear"
    """Linear layers: all-linear (except the output embedding), or names such as [c_attn]."""

    def check(self, model: ModelSettings) -> list[str]:
        """TransformerLens does not support adapters."""
        if not ENGINES[model.engine].is_plain:
            return ["finetune=lora needs model.engine=fast; policy.hooked() shows the merged model"]
        return []

    def select(self, language_model: PreTrainedModel) -> None:
        self._add(language_model, seed=0)

    def attach(self, policy: TransformerWithValueHead, *, seed: int) -> Reference:
        self._add(policy.language_model, seed=seed)
        return WithoutAdapter(policy)

    def _add(self, language_model: PreTrainedModel, *, seed: int) -> None:
        try:
            add_adapter(
                language_model,
                rank=self.rank,
                alpha=self.alpha,
                target_modules=self.target_modules,
                seed=seed,
            )
        except ValueError as error:
            reason = str(error).splitlines()[0][:300]
            raise ConfigError(f"finetune.target_modules={self.target_modules}: {reason}") from error

"""Low-rank adapters in a language model, through PEFT: put in, switched off, merged, saved.

The model stays of its own Hugging Face class; the adapter sits inside of its linear layers.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf_exp.hf import PreTrainedModel

ADAPTER = "default"  # PEFT's own name for the only one


def add_adapter(
    language_model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    target_modules: str | list[str],
    seed: int,
) -> None:
    """Freezes the model and adds rank-`rank` adapters, drawn with the seed and of no effect yet, to
    the linear layers that `target_modules` names, or to all of them but the output embedding.
    Raises ValueError if it names none, or an embedding."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,  # with dropout the first PPO ratio is not 1
        target_modules=target_modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=language_model.name_or_path or None,
        fan_in_fan_out=_is_conv1d(language_model),
    )
    embeddings = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    for name, module in language_model.named_modules():
        # The two may be one matrix, of which a merge would change both.
        if module in embeddings and check_target_module_exists(config, name):
            raise ValueError(f"{name} is an embedding; name linear layers between the embeddings")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, language_model)
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # bf16 would round small updates away


def _is_conv1d(language_model: PreTrainedModel) -> bool:
    """Whether linear layers are GPT-2's Conv1D, whose weights are transposed."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in language_model.modules())


def has_adapter(language_model: PreTrainedModel) -> bool:
    """Whether adapters were added to the model."""
    return any("lora_" in name for name, _ in language_model.named_parameters())


@contextmanager
def adapter_off(language_model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before its adapters, inside of the block."""
    layers = [module for _, module in _adapted_layers(language_model)]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters() would switch requires_grad as well
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_state(language_model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the plain model that computes the same, by its own names. Only adapted
    matrices are copied."""
    layers = dict(_adapted_layers(language_model))
    state = {}
    for name, tensor in language_model.state_dict().items():
        if "lora_" in name:
            continue
        prefix, adapted, rest = name.partition(".base_layer.")
        if not adapted:
            state[name] = tensor
            continue
        if rest == "weight":
            delta = layers[prefix].get_delta_weight(ADAPTER)
            tensor = (tensor.float() + delta.float()).to(tensor.dtype)
        state[f"{prefix}.{rest}"] = tensor
    return state


def merged_copy(language_model: PreTrainedModel) -> PreTrainedModel:
    """A plain model of the same class that computes the same."""
    plain = type(language_model)(language_model.config).to(
        device=language_model.device, dtype=language_model.dtype
    )
    plain.load_state_dict(merged_state(language_model))
    plain.name_or_path = language_model.name_or_path
    return plain.eval()


def save_adapter(language_model: PreTrainedModel, path: Path) -> None:
    """Writes the adapters alone, as PEFT's PeftModel.from_pretrained(base_model, path) opens."""
    config = language_model.peft_config[ADAPTER]
    path.mkdir(parents=True, exist_ok=True)
    state = {
        f"base_model.model.{name.replace(f'.{ADAPTER}', '')}": tensor.contiguous()
        for name, tensor in language_model.state_dict().items()
        if "lora_" in name
    }
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {**config.to_dict(), "inference_mode": True}
    (path / "adapter_config.json").write_text(
        json.dumps(described, indent=2, default=_jsonable, sort_keys=True) + "\n"
    )


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _adapted_layers(language_model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in language_model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module

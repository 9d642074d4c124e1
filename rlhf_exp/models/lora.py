"""Low-rank adapters in a language model, through PEFT: adds, switches off, merges and saves them.

The model keeps its Hugging Face class; the adapters are inside its linear layers.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_exp.hf import PreTrainedModel

ADAPTER = "default"  # PEFT's name for a single adapter
WRAPPER = "base_layer"  # PEFT adds this to the names of the weights that it wraps


def add_adapter(
    language_model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    target_modules: str | list[str],
    seed: int,
) -> None:
    """Freezes the model and adds adapters of rank `rank` to the linear layers that `target_modules`
    names, or to all except the output embedding. They are drawn with the seed and start without
    effect. Raises ValueError if `target_modules` names no layer, an embedding, or a layer whose
    adapter cannot be merged or is never called; layers on the meta device, which have no weights,
    are not tried out."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,  # with dropout the first PPO ratio is not 1
        target_modules=target_modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=language_model.name_or_path or None,
        # GPT-2's linear layers have transposed weights.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in language_model.modules()),
    )
    embeddings = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    for name, module in language_model.named_modules():
        # The two may share a matrix; a merge would change both.
        if module in embeddings and check_target_module_exists(config, name):
            raise ValueError(f"{name} is an embedding; name linear layers between the embeddings")
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT warns of the ranks that it sets itself for the experts' fused matrices.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not")
        torch.manual_seed(seed)
        inject_adapter_in_model(config, language_model)
    if language_model.device.type != "meta":
        for name, layer in _adapted_layers(language_model):
            _check_mergeable(name, layer)
        _check_called(language_model)
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # bf16 would round small updates away


@torch.no_grad()
def _check_mergeable(name: str, layer: Any) -> None:
    """Raises ValueError for a layer that computes more than a product with its matrix: the merged
    matrix would not compute the same as the layer with its adapter."""
    from peft.tuners import lora
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.pytorch_utils import Conv1D

    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper) or type(base) in (nn.Linear, Conv1D):
        return
    kind = f"{name} is a {type(base).__name__}"
    if not (isinstance(layer, lora.Linear) and isinstance(base, nn.Linear)):
        raise ValueError(f"{kind}, whose adapters cannot be merged; name linear layers")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, base.in_features, generator=generator).to(base.weight)
    outputs = base(inputs)
    expected = nn.functional.linear(inputs, base.weight, base.bias)
    bound = 1e-2 * expected.abs().max()
    if not isinstance(outputs, Tensor) or (outputs - expected).abs().max() > bound:
        raise ValueError(
            f"{kind}, which does more than multiply by its matrix, so that its adapter cannot be"
            " merged; name other layers, such as [q_proj, k_proj, v_proj, o_proj]"
        )


def _check_called(language_model: PreTrainedModel) -> None:
    """Raises ValueError for a layer whose matrix the model uses without calling the layer (Jamba's
    dt_proj): its adapter would have no effect until it is merged."""
    uncalled = {
        name: layer
        for name, layer in _adapted_layers(language_model)
        if isinstance(layer.get_base_layer(), nn.Linear)
    }
    tokens = torch.arange(4, device=language_model.device)[None] % language_model.config.vocab_size

    def run() -> Tensor:
        return language_model(input_ids=tokens, use_cache=False).logits.sum()

    def note(name: str, *_: Any) -> None:
        uncalled.pop(name, None)

    hooks = [
        layer.register_forward_pre_hook(partial(note, name)) for name, layer in uncalled.items()
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    if not uncalled:
        return
    weights = [layer.get_base_layer().weight.requires_grad_() for layer in uncalled.values()]
    gradients = torch.autograd.grad(run(), weights, allow_unused=True)  # None: an unused expert
    for name, gradient in zip(uncalled, gradients, strict=True):
        if gradient is not None:
            last = name.rpartition(".")[2]
            raise ValueError(
                f"{type(language_model).__name__} uses the matrix of {name} without calling the"
                f" layer, so that an adapter would have no effect; name other layers than {last}"
            )


def has_adapter(language_model: PreTrainedModel) -> bool:
    """Returns True if the model has adapters."""
    return any("lora_" in name for name, _ in language_model.named_parameters())


@contextmanager
def adapter_off(language_model: PreTrainedModel) -> Iterator[None]:
    """Switches the adapters off within the block."""
    layers = [module for _, module in _adapted_layers(language_model)]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters() would change requires_grad too
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_state(language_model: PreTrainedModel) -> dict[str, Tensor]:
    """The merged weights under the names of the plain model. Only adapted matrices are copied."""
    state = {
        plain_name(name): tensor
        for name, tensor in language_model.state_dict().items()
        if "lora_" not in name
    }
    for name, delta in adapter_deltas(language_model):
        state[name] = (state[name].float() + delta.float()).to(state[name].dtype)
    return state


def adapter_deltas(language_model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What the adapters add to each adapted matrix, by its name in the plain model."""
    for prefix, layer in _adapted_layers(language_model):
        matrix = getattr(layer, "parameter_name", "weight")  # a ParamWrapper's may be another
        yield plain_name(f"{prefix}.{matrix}"), layer.get_delta_weight(ADAPTER)


def plain_name(name: str) -> str:
    """A weight's name without PEFT's wrappers; an expert's weight may have several."""
    return ".".join(part for part in name.split(".") if part != WRAPPER)


def merged_copy(language_model: PreTrainedModel) -> PreTrainedModel:
    """A plain model of the same class with the merged weights."""
    plain = type(language_model)(language_model.config).to(
        device=language_model.device, dtype=language_model.dtype
    )
    plain.load_state_dict(merged_state(language_model))
    plain.name_or_path = language_model.name_or_path
    return plain.eval()


def save_adapter(language_model: PreTrainedModel, path: Path) -> None:
    """Writes only the adapters, for PEFT's PeftModel.from_pretrained(base_model, path)."""
    config = language_model.peft_config[ADAPTER]
    path.mkdir(parents=True, exist_ok=True)
    state = {
        f"base_model.model.{name.replace(f'.{ADAPTER}', '')}": tensor.contiguous()
        for name, tensor in language_model.state_dict().items()
        if "lora_" in name
    }
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    values = {**config.to_dict(), "inference_mode": True}
    (path / "adapter_config.json").write_text(
        json.dumps(values, indent=2, default=_jsonable, sort_keys=True) + "\n"
    )


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _adapted_layers(language_model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in language_model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module

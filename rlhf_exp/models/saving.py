"""Saves a policy as a Hugging Face directory that other tools open, with its value head."""

from pathlib import Path

from safetensors.torch import save_model

from rlhf_exp.models.loading import VALUE_HEAD_FILE
from rlhf_exp.models.lora import has_adapter, merged_state, save_adapter
from rlhf_exp.models.policy import TransformerWithValueHead


def save_policy(policy: TransformerWithValueHead, path: str | Path) -> Path:
    """Writes model (safetensors), tokenizer, config, generation config and value head, if there is
    one, to the directory and returns the path. A reloaded policy gives bit-equal logits and values.

    A value head on a separate trunk is not written: without the trunk it means nothing. With
    adapters it writes the merged weights, whose logits are equal up to rounding, and the
    adapters to `adapter/`.
    """
    path = Path(path)
    model = policy.language_model
    if has_adapter(model):
        model.save_pretrained(path, state_dict=merged_state(model))
        save_adapter(model, path / "adapter")
    else:
        model.save_pretrained(path)
    policy.tokenizer.save_pretrained(path)
    if policy.value_head is not None and policy.value_trunk is None:
        save_model(policy.value_head, str(path / VALUE_HEAD_FILE), metadata={"format": "pt"})
    return path

"""A policy as a Hugging Face directory that other tools open, its value head beside it."""

from pathlib import Path

from safetensors.torch import save_file

from rlhf_exp.models.loading import VALUE_HEAD_FILE
from rlhf_exp.models.policy import TransformerWithValueHead


def save_policy(policy: TransformerWithValueHead, path: str | Path) -> Path:
    """Writes model (safetensors), tokenizer, config, generation config and value head to the
    directory, and returns it. A reload gives bit-equal logits and values."""
    path = Path(path)
    policy.language_model.save_pretrained(path)
    policy.tokenizer.save_pretrained(path)
    head = {name: tensor.contiguous() for name, tensor in policy.value_head.state_dict().items()}
    save_file(head, path / VALUE_HEAD_FILE, metadata={"format": "pt"})
    return path

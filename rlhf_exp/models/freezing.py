"""Freezes the first blocks of a language model."""

from torch import nn

from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.settings import ConfigError


def freeze_first_layers(language_model: PreTrainedModel, num_layers: int, *, field: str) -> None:
    """Freezes the model, embeddings included, but not its last `num_layers` blocks and the final
    layer norm. Raises ConfigError naming `field` if there are fewer blocks."""
    language_model.requires_grad_(False)
    if not num_layers:
        return
    children = list(language_model.base_model.children())
    block_lists = [module for module in children if isinstance(module, nn.ModuleList)]
    if len(block_lists) != 1:
        raise ConfigError(
            f"{type(language_model).__name__} has no single list of blocks, so {field} cannot"
            " select any"
        )
    [blocks] = block_lists
    if num_layers > len(blocks):
        raise ConfigError(f"the model has {len(blocks)} blocks, fewer than {field}={num_layers}")
    for module in (*blocks[-num_layers:], *children[children.index(blocks) + 1 :]):
        module.requires_grad_(True)

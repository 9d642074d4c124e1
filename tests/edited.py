"""Interventions and what they do, worked out token by token through hooks put on by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_exp.models.interventions import Ablate, Add, Intervention
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.transformer import CausalTransformer, position_ids

WIDTH, HEAD = 16, 8  # of tiny_policy's residual stream and of its two heads
ByHand = Callable[[Tensor], Tensor]  # of one token's activation [width], float64

DRAWN = torch.Generator().manual_seed(5)
VECTORS = {
    "vector": torch.randn(WIDTH, generator=DRAWN),
    "of_heads": torch.randn(2, HEAD, generator=DRAWN),
    "direction": torch.randn(WIDTH, generator=DRAWN),
}
MEANS = {
    "blocks.0.attn.hook_z": torch.randn(2, HEAD, generator=DRAWN),
    "blocks.1.attn.hook_z": torch.randn(2, HEAD, generator=DRAWN),
    "blocks.1.hook_mlp_out": torch.randn(WIDTH, generator=DRAWN),
    "blocks.0.hook_resid_pre": torch.randn(WIDTH, generator=DRAWN),
    "blocks.1.hook_resid_pre": torch.randn(WIDTH, generator=DRAWN),
}
OUTPUTS = {"heads": [[0, 1], [1, 0]], "mlps": [1]}
ALONG = {"sites": ["blocks.*.hook_resid_pre"], "direction_tensor": "direction"}
# Every case, and all positions.
CHANGES = (
    ("add", "all"),
    ("add", "prompt"),
    ("add", "completion"),
    ("add to heads", "completion"),
    ("zero", "prompt"),
    ("mean", "all"),
    ("direction", "completion"),
    ("mean direction", "prompt"),
)


def settings(case: str, folder: Path, **fields: Any) -> Intervention:
    """The intervention of that name, its files in the folder."""
    vectors, means = folder / "vectors.safetensors", folder / "means.safetensors"
    save_file(VECTORS, vectors)
    save_file(MEANS, means)
    if case == "add":
        sites = ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "ln_final.hook_out"]
        return Add(**{"path": str(vectors), "sites": sites, "scale": 0.7, **fields})
    if case == "add to heads":
        sites = ["blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"]
        return Add(**{"path": str(vectors), "tensor": "of_heads", "sites": sites, **fields})
    chosen = {"direction": str(vectors), **ALONG} if "direction" in case else OUTPUTS
    return Ablate(**chosen, means=str(means) if "mean" in case else None, **fields)


def by_hand(case: str) -> dict[str, ByHand]:
    """What it does to each token, by site."""
    if case == "add":
        sites = ("blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "ln_final.hook_out")
        return {site: lambda x: x + 0.7 * VECTORS["vector"].double() for site in sites}
    if case == "add to heads":
        sites = ("blocks.1.attn.hook_z", "blocks.0.hook_mlp_out")
        return {site: lambda x: x + VECTORS["of_heads"].flatten().double() for site in sites}
    means = MEANS if "mean" in case else {name: torch.zeros_like(x) for name, x in MEANS.items()}
    means = {name: mean.flatten().double() for name, mean in means.items()}
    if "direction" in case:
        d = VECTORS["direction"].double()
        return {
            site: lambda x, mean=means[site]: x + d * ((mean @ d) - (x @ d)) / (d @ d)
            for site in ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre")
        }
    z0, z1 = means["blocks.0.attn.hook_z"], means["blocks.1.attn.hook_z"]
    return {
        "blocks.0.attn.hook_z": lambda x: torch.cat([x[:HEAD], z0[HEAD:]]),
        "blocks.1.attn.hook_z": lambda x: torch.cat([z1[:HEAD], x[HEAD:]]),
        "blocks.1.hook_mlp_out": lambda x: means["blocks.1.hook_mlp_out"],
    }


def is_edited(column: int, prompt_len: int, positions: str) -> bool:
    return positions in ("all", "prompt" if column < prompt_len else "completion")


def edited_by_hand(
    x: Tensor, hook: Any = None, *, change: ByHand, mask: Tensor, prompt_len: int, positions: str
) -> Tensor:
    """The activation [batch seq ...], changed one token at a time."""
    out = x.clone()
    for row, column in mask.nonzero().tolist():
        if is_edited(column, prompt_len, positions):
            changed = change(x[row, column].flatten().double())
            out[row, column] = changed.to(x.dtype).view_as(x[row, column])
    return out


def module_of(model: CausalTransformer, site: str) -> tuple[nn.Module, bool]:
    """The module of a site in Hugging Face's model, and whether the site is its input."""
    base = model.language_model.base_model
    if site == "ln_final.hook_out":
        last = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}
        return getattr(base, last.get(model.language_model.config.model_type, "norm")), False
    _, layer, name = site.split(".", 2)
    block = (base.h if hasattr(base, "h") else base.layers)[int(layer)]
    attention = {"GPT2Block": "attn", "GPTNeoXLayer": "attention"}
    output = {"GPT2Block": "c_proj", "GPTNeoXLayer": "dense"}
    attn = getattr(block, attention.get(type(block).__name__, "self_attn"))
    return {
        "hook_resid_pre": (block, True),
        "hook_resid_post": (block, False),
        "hook_mlp_out": (block.mlp, False),
        "hook_attn_out": (attn, False),
        "attn.hook_z": (getattr(attn, output.get(type(block).__name__, "o_proj")), True),
    }[name]


@contextmanager
def hooked_by_hand(
    model: CausalTransformer, case: str, mask: Tensor, *, prompt_len: int, positions: str
) -> Iterator[None]:
    """Hugging Face's model changed in passes over whole sequences with this mask."""
    handles = []
    for site, change in by_hand(case).items():
        edit = partial(
            edited_by_hand, change=change, mask=mask, prompt_len=prompt_len, positions=positions
        )
        module, is_input = module_of(model, site)
        if is_input:

            def before(module: Any, args: Any, edit: Any = edit) -> Any:
                return (edit(args[0]), *args[1:])

            handles.append(module.register_forward_pre_hook(before))
        else:

            def after(module: Any, args: Any, out: Any, edit: Any = edit) -> Any:
                return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

            handles.append(module.register_forward_hook(after))
    yield
    for handle in handles:
        handle.remove()


def pass_by_hand(
    policy: TransformerWithValueHead,
    case: str | None,
    tokens: Tensor,
    mask: Tensor,
    *,
    prompt_len: int,
    positions: str = "all",
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, values and final hidden states of Hugging Face's model with such hooks."""
    model, (first, activation, last) = policy.language_model, policy.value_head
    given = {"attention_mask": mask.long(), "position_ids": position_ids(mask)}
    change = {"prompt_len": prompt_len, "positions": positions}
    hooks = hooked_by_hand(policy, case, mask, **change) if case else torch.enable_grad()
    with hooks:
        hidden = model.base_model(input_ids=tokens, use_cache=False, **given).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    return logits, last(activation(first(hidden)))[..., 0], hidden

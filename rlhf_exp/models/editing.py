"""Edits to the activations of a plain Hugging Face model, at sites with TransformerLens's names.

The names come from TransformerLens's adapter of the architecture. The edits are PyTorch hooks that
exist only during a pass of the policy: copies, saved models and the reference are not edited.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.settings import ConfigError

Positions = Literal["all", "prompt", "completion"]
Edit = Callable[[Tensor], Tensor]  # on activations [batch seq width], with all heads in width
Editing = Callable[[], AbstractContextManager[None]]  # makes the context of an edited pass
BridgeHook = tuple[str, Callable[..., Tensor]]


class Site(NamedTuple):
    """The input or the output of a module."""

    module: nn.Module
    is_input: bool

    def hook(self, edit: Edit) -> RemovableHandle:
        """Applies `edit` to the activation until the handle is removed."""

        def edit_input(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            if "hidden_states" in kwargs:
                return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}
            return None

        def edit_output(module: nn.Module, args: Any, output: Any) -> Any:
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        if self.is_input:
            return self.module.register_forward_pre_hook(edit_input, with_kwargs=True)
        return self.module.register_forward_hook(edit_output)


class Sites:
    """The sites of a model: inputs and outputs of modules that TransformerLens has a name for.
    Raises ConfigError for an architecture that TransformerLens does not support."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformer_lens.factories.architecture_adapter_factory import (
            ArchitectureAdapterFactory,
        )
        from transformer_lens.model_bridge import TransformerBridge as Bridge
        from transformer_lens.model_bridge.sources._bridge_builder import (
            build_bridge_config_from_hf,
        )

        name = self.architecture = type(model).__name__
        try:
            config = build_bridge_config_from_hf(model.config, name, name, model.dtype)
            self._adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
        except Exception as error:  # adapters raise different errors
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
            raise ConfigError(
                f"intervention: sites have TransformerLens's names, and it does not know {name}"
                f" ({reason}); use intervention=none, or a model of another architecture"
            ) from error
        self.num_heads = int(self._adapter.cfg.n_heads)
        self._sites: dict[str, Site] = {}
        for part, component in self._adapter.get_component_mapping().items():
            self._add(part, component, model)
        self._alias("", Bridge.hook_aliases)

    def _add(self, path: str, component: Any, parent: nn.Module) -> None:
        """Adds the sites of an adapter's component and of its parts, if the model has them."""
        module: Any = parent
        if component.name is not None:
            try:
                module = self._adapter.get_remote_component(parent, component.name)
            except (AttributeError, ValueError):
                return
            if module is None:
                return
        modules = {path: module}
        if component.is_list_item:
            modules = {f"{path}.{i}": layer for i, layer in enumerate(module)}
        for name, each in modules.items():
            for part, child in component.submodules.items():
                self._add(f"{name}.{part}", child, each)
            if component.name is not None:
                self._sites[f"{name}.hook_in"] = Site(each, is_input=True)
                self._sites[f"{name}.hook_out"] = Site(each, is_input=False)
            self._alias(f"{name}.", component.hook_aliases)

    def _alias(self, prefix: str, aliases: dict[str, Any]) -> None:
        for alias, targets in aliases.items():
            for target in [targets] if isinstance(targets, str) else targets:
                if prefix + target in self._sites:
                    self._sites[prefix + alias] = self._sites[prefix + target]
                    break

    def find(self, names: Sequence[str], *, field: str) -> dict[str, Site]:
        """The sites with these names, in which * matches anything between two dots. Raises
        ConfigError for a name without a site."""
        chosen: dict[str, Site] = {}
        for name in names:
            pattern = re.compile(re.escape(name).replace(r"\*", "[^.]*"))
            matches = [site for site in self._sites if pattern.fullmatch(site)]
            if not matches:
                near = difflib.get_close_matches(name, self._sites, n=3, cutoff=0)
                raise ConfigError(
                    f"{field}: {self.architecture} has no site {name}; nearest are"
                    f" {', '.join(near)}"
                )
            chosen |= {match: self._sites[match] for match in matches}
        return chosen


class Edits:
    """The edits that a policy applies in each pass, in order, at the columns of the prompt, of the
    completion or of both. Padding is not edited if the pass has a mask."""

    def __init__(
        self, edits: Sequence[tuple[str, Site, Edit]] = (), positions: Positions = "all"
    ) -> None:
        self._edits = edits
        self._positions = positions

    def during(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch _"] | None,
        prompt_len: int | None,
    ) -> Editing:
        """A function that returns a context in which a pass over `tokens` is edited. The first
        `prompt_len` tokens belong to the prompt. `mask` covers cached tokens too; its last columns
        are those of `tokens`."""
        if not self._edits:
            return nullcontext
        edit_mask = self._columns_to_edit(tokens.shape[1], mask, prompt_len, tokens.device)
        return nullcontext if edit_mask is False else partial(self._hooked, edit_mask)

    @contextmanager
    def off(self) -> Iterator[None]:
        """A context in which passes are not edited."""
        edits, self._edits = self._edits, ()
        try:
            yield
        finally:
            self._edits = edits

    @contextmanager
    def in_bridge(
        self, mask: Bool[Tensor, "batch seq"], prompt_len: int | None
    ) -> Iterator[list[BridgeHook]]:
        """Hook functions that apply the edits in TransformerLens's passes over whole sequences.
        `mask` covers the first columns; later columns are real. At the end of the block raises
        ConfigError for a site that TransformerLens did not compute."""
        computed: set[str] = set()

        def edit_in_bridge(name: str, edit: Edit, x: Tensor, hook: Any) -> Tensor:
            computed.add(name)
            real = nn.functional.pad(mask, (0, x.shape[1] - mask.shape[1]), value=True)
            edit_mask = self._columns_to_edit(x.shape[1], real, prompt_len, x.device)
            return x if edit_mask is False else _apply_edit(edit, edit_mask, x)

        yield [(name, partial(edit_in_bridge, name, edit)) for name, _, edit in self._edits]
        for name, _, _ in self._edits:
            if name not in computed:
                raise ConfigError(
                    f"intervention: TransformerLens does not compute {name} on this architecture;"
                    " choose another site, or model.engine=fast and sampler=cached"
                )

    def _columns_to_edit(
        self, length: int, mask: Tensor | None, prompt_len: int | None, device: torch.device
    ) -> Tensor | bool:
        """A mask [batch length 1] that is True at the columns to edit; a bool if it is the same for
        all columns."""
        start, end = 0, length
        if self._positions != "all":
            if prompt_len is None:
                raise ValueError(
                    f"intervention.positions={self._positions}: pass prompt_len, the number of the"
                    " prompt's tokens"
                )
            start, end = (0, prompt_len) if self._positions == "prompt" else (prompt_len, length)
        edit_mask: Tensor | bool = start < end
        if edit_mask and end - start < length:
            columns = torch.arange(length, device=device)
            edit_mask = ((start <= columns) & (columns < end))[None, :, None]
        if mask is None or edit_mask is False:
            return edit_mask
        return edit_mask & mask[:, -length:, None]

    @contextmanager
    def _hooked(self, edit_mask: Tensor | bool) -> Iterator[None]:
        handles = [
            site.hook(partial(_apply_edit, edit, edit_mask)) for _, site, edit in self._edits
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _apply_edit(edit: Edit, edit_mask: Tensor | bool, x: Tensor) -> Tensor:
    """The activation, edited where `edit_mask` is True. With TransformerLens, `x` may have an axis
    for heads."""
    flat = x.flatten(2)
    edited = edit(flat).to(x.dtype)
    if isinstance(edit_mask, Tensor):
        edited = torch.where(edit_mask, edited, flat)
    return edited.unflatten(2, x.shape[2:])

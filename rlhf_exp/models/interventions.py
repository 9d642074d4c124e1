"""Interventions on a policy: edits to its activations while it samples, learns and is evaluated.

Sites have TransformerLens's names, such as blocks.3.hook_resid_post; * matches anything between two
dots. `positions` are columns of tokens: `prompt` all tokens of the prompt, `completion` the sampled
ones, `all` both. The distribution of completion token y_t is computed in the column before y_t, so
`completion` changes the distributions of y_1 and later, and `prompt` that of y_0.

The reference, saved models and `policy.hooked()` have no intervention.
"""

import difflib
import hashlib
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.models.editing import Edit, Edits, Positions, Site, Sites
from rlhf_exp.models.loading import ModelSettings
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.settings import ConfigError, Index, Real, Text, settings


@settings
class Intervention(ABC):
    """The settings of an intervention group."""

    @abstractmethod
    def edits(self, network: PreTrainedModel) -> Edits:
        """The edits of the network's activations. Raises ConfigError if the network does not
        fit."""

    def attach(self, policy: CausalTransformer) -> None:
        """Edits the policy's activations from now on. Call it after finetune.attach and before
        passes are compiled. Raises ConfigError if the model does not fit."""
        assert not policy.is_compiled, "a compiled pass ignores new hooks"
        policy.edits = self.edits(policy.language_model)

    def check(self, model: ModelSettings) -> list[str]:
        """Messages about an intervention that does not fit the model; problems that need its
        weights are found at load."""
        skeleton = model.skeleton()
        if skeleton is None:
            return []
        try:
            self.edits(skeleton)
        except ConfigError as error:
            return [str(error)]
        except (RuntimeError, NotImplementedError):  # its passes read weights: checked at load
            pass
        return []


@settings
class NoIntervention(Intervention):
    """The policy runs unedited."""

    def edits(self, network: PreTrainedModel) -> Edits:
        return Edits()

    def check(self, model: ModelSettings) -> list[str]:
        return []


NO_INTERVENTION = NoIntervention()


@settings
class Add(Intervention):
    """Adds `scale` times a vector at `sites`. The safetensors file `path` holds the vector under
    the name `tensor`, in the shape of the activation; for attn.hook_z also [head d_head].
    """

    path: Text
    """A safetensors file with the vector."""
    tensor: Text = "vector"
    """The vector's name in the file."""
    sites: tuple[Text, ...]
    """Sites to add it at, with TransformerLens's names: [blocks.3.hook_resid_post]; * matches
    anything between two dots."""
    scale: Real = 1.0
    """Factor of the vector, -10 to 10."""
    positions: Positions = "all"
    """The tokens to edit: prompt, completion, all."""

    def fingerprint(self) -> str:
        """A hash of the file. Raises ConfigError if it does not hold the vector."""
        self._check_vector()
        return _hash(self.path)

    def _check_vector(self) -> None:
        if not self.sites:
            raise ConfigError("intervention.sites is empty: set [blocks.LAYER.hook_resid_post]")
        read_vector(self.path, self.tensor, field="intervention.path")

    def edits(self, network: PreTrainedModel) -> Edits:
        self._check_vector()
        sites = Sites(network).find(self.sites, field="intervention.sites")
        edits: list[tuple[str, Site, Edit]] = []
        for name, width in measure_widths(network, sites).items():
            vector = read_vector(self.path, self.tensor, field="intervention.path", width=width)
            edit = partial(torch.add, other=vector.to(network.device), alpha=self.scale)
            edits.append((name, sites[name], edit))
        return Edits(edits, self.positions)


@settings
class Ablate(Intervention):
    """Replaces the outputs of heads ([layer, head], at attn.hook_z), the outputs of MLPs (layers,
    at hook_mlp_out), and the component of the activations at `sites` along a direction. The
    safetensors file `direction` holds the direction under the name `direction_tensor`.

    The replacement is 0, or a mean: the safetensors file `means` holds each site's mean activation
    under the site's name, such as `cache[name].mean((0, 1))` of TransformerLens's run_with_cache.
    The means stay constant while the policy learns.
    """

    heads: tuple[tuple[Index, Index], ...] = ()
    """[layer, head] of attention heads whose outputs are replaced, both from 0: [[3,0],[3,7]]."""
    mlps: tuple[Index, ...] = ()
    """Layers whose MLP's output is replaced, from 0: [3,4]."""
    direction: Text | None = None
    """A safetensors file with a direction; the component along it is replaced at `sites`; null:
    none."""
    direction_tensor: Text = "direction"
    """The direction's name in the file."""
    sites: tuple[Text, ...] = ()
    """Sites with TransformerLens's names: [blocks.*.hook_resid_pre]; * matches anything between
    two dots."""
    means: Text | None = None
    """A safetensors file with the replacements: each site's mean activation under its name; null:
    0."""
    positions: Positions = "all"
    """The tokens to edit: prompt, completion, all."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> "Ablate":
        if (self.direction is None) == bool(self.sites):
            raise ValueError("direction and sites go together: set both, or neither")
        return self

    @property
    def _heads(self) -> dict[str, list[int]]:
        by_site: dict[str, list[int]] = {}
        for layer, head in self.heads:
            by_site.setdefault(f"blocks.{layer}.attn.hook_z", []).append(head)
        return by_site

    @property
    def _mlps(self) -> list[str]:
        return [f"blocks.{layer}.hook_mlp_out" for layer in self.mlps]

    def fingerprint(self) -> str:
        """A hash of the files. Raises ConfigError if they lack a vector, or if nothing is
        ablated."""
        self._check_vectors()
        return _hash(self.direction, self.means)

    def _check_vectors(self) -> None:
        names = [*self._heads, *self._mlps, *self.sites]
        if not names:
            raise ConfigError(
                "intervention: nothing is ablated: set intervention.heads=[[LAYER,HEAD]],"
                " intervention.mlps=[LAYER], or intervention.direction and intervention.sites"
            )
        if self.direction is not None:
            self._unit(self.direction)
        if self.means is not None:
            for name in names:
                if "*" not in name:
                    read_vector(self.means, name, field="intervention.means")

    def edits(self, network: PreTrainedModel) -> Edits:
        self._check_vectors()
        model_sites = Sites(network)
        outputs = model_sites.find([*self._heads], field="intervention.heads")
        outputs |= model_sites.find(self._mlps, field="intervention.mlps")
        along = model_sites.find(self.sites, field="intervention.sites")
        edits: list[tuple[str, Site, Edit]] = []
        for name, width in measure_widths(network, outputs | along).items():
            mean = torch.zeros(width)
            if self.means is not None:
                mean = read_vector(self.means, name, field="intervention.means", width=width)
            mean = mean.to(network.device)
            if name in outputs:
                replaced = _columns(self._heads.get(name), width, model_sites.num_heads, name)
                edit = partial(_replace, replaced.to(network.device), mean)
                edits.append((name, outputs[name], edit))
            if name in along and self.direction is not None:
                unit = self._unit(self.direction, width=width).to(network.device)
                edits.append((name, along[name], partial(_replace_along, unit, mean)))
        return Edits(edits, self.positions)

    def _unit(self, path: str, *, width: int | None = None) -> Tensor:
        vector = read_vector(
            path, self.direction_tensor, field="intervention.direction", width=width
        )
        if not vector.any():
            raise ConfigError(f"intervention.direction={path}: {self.direction_tensor} is all 0")
        return vector / vector.norm()


def _columns(heads: list[int] | None, width: int, num_heads: int, name: str) -> Tensor:
    """A mask that is True at the entries of a site's activation that belong to the heads; None if
    all entries do."""
    if heads is None:
        return torch.ones(width, dtype=torch.bool)
    if max(heads) >= num_heads:
        raise ConfigError(
            f"intervention.heads: there is no head {max(heads)} at {name}; the last is"
            f" {num_heads - 1}"
        )
    chosen = torch.zeros(num_heads, dtype=torch.bool)
    chosen[heads] = True
    return chosen.repeat_interleave(width // num_heads)


def _replace(replaced: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    return torch.where(replaced, mean, x)


def _replace_along(unit: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    return x - ((x - mean) * unit).sum(dim=-1, keepdim=True) * unit


def read_vector(path: str, key: str, *, field: str, width: int | None = None) -> Tensor:
    """A tensor of a safetensors file, flattened and in fp32. Raises ConfigError if the file or the
    key does not exist, or if the tensor is not finite or does not have `width` entries."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            vector = file.get_tensor(key) if key in keys else None
    except (OSError, SafetensorError) as error:
        reason = "there is no such file" if not Path(path).is_file() else str(error)
        raise ConfigError(f"{field}={path}: {reason}; name a safetensors file") from error
    if vector is None:
        near = difflib.get_close_matches(key, keys, n=3, cutoff=0)
        raise ConfigError(f"{field}={path} has no {key}; it has {', '.join(near) or 'nothing'}")
    if not vector.is_floating_point() or not vector.isfinite().all():
        raise ConfigError(f"{field}={path}: {key} is not a tensor of finite floats")
    if width not in (None, vector.numel()):
        raise ConfigError(
            f"{field}={path}: {key} has shape {list(vector.shape)}, but the activation has {width}"
            " entries; choose a site of that width, or a vector of this model"
        )
    return vector.float().flatten()


@torch.no_grad()
def measure_widths(network: PreTrainedModel, sites: dict[str, Site]) -> dict[str, int]:
    """The width of the activation at each site, from a pass over two tokens. Raises ConfigError for
    a site whose activation is not a float tensor [batch seq width]."""
    shapes: dict[str, torch.Size] = {}

    def note(name: str, x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            shapes[name] = x.shape
        return x

    handles = [site.hook(partial(note, name)) for name, site in sites.items()]
    tokens = torch.zeros((1, 2), dtype=torch.long, device=network.device)
    embedded = network.get_input_embeddings()(tokens)
    network.base_model(
        inputs_embeds=embedded, attention_mask=torch.ones_like(tokens), use_cache=False
    )
    for handle in handles:
        handle.remove()
    for name in sites:
        shape = shapes.get(name)
        if shape is None or len(shape) != 3 or shape[1] != 2:
            raise ConfigError(
                f"intervention: {name} has no activation [batch seq width] in the passes of"
                f" {type(network).__name__}; choose another site"
            )
    return {name: shapes[name][2] for name in sites}


def _hash(*paths: str | None) -> str:
    files = [Path(path).read_bytes() for path in paths if path is not None]
    return hashlib.sha256(b"".join(files)).hexdigest()

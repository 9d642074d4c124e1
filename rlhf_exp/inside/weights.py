"""Weight differences: how much and in how many directions each matrix, head and layer changed.

Beside each number of a spectrum stands that of a random matrix of the same shape.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_exp.functional.spectra import (
    alignment,
    effective_rank,
    energy_share,
    squared_singular_values,
)
from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.inside.figures import COLORS, blocks, make_panels, save
from rlhf_exp.inside.loading import Pair
from rlhf_exp.inside.subject import Subject, Track, no_progress
from rlhf_exp.models.hooked import boot_bridge
from rlhf_exp.settings import ConfigError

TOLERANCES = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
DIRECTIONS = (1, 4, 16, 64)
ALIGNED = 16  # of the base's singular directions; fewer for a small matrix
SIDES = ("W_Q", "W_K", "W_V", "W_O")


class Weight(NamedTuple):
    """A weight before and after. A matrix has the orientation of nn.Linear: its rows are outputs,
    or tokens of an embedding. `layer` is None outside of the blocks."""

    name: str
    layer: int | None
    base: Tensor
    tuned: Tensor

    @property
    def kind(self) -> str:
        """The name with * for the number of its block."""
        return re.sub(r"\.\d+\.", ".*.", self.name, count=1)


def measure(subject: Subject) -> dict[str, Any]:
    """The differences of the run's models."""
    return differences(subject.pair, seed=subject.run.seed, track=subject.track)


def weights_of(pair: Pair) -> Iterator[Weight]:
    """Every weight of the language models; a shared one once."""
    from transformers.pytorch_utils import Conv1D

    models: tuple[PreTrainedModel, ...] = tuple(policy.language_model for policy in pair)
    transposed = {id(module.weight) for module in models[0].modules() if isinstance(module, Conv1D)}
    for name, base in models[0].named_parameters():
        tuned = models[1].get_parameter(name)
        block = re.search(r"\.(\d+)\.", name)
        one, other = base.detach(), tuned.detach()
        if id(base) in transposed:
            one, other = one.T, other.T
        yield Weight(name, int(block[1]) if block else None, one, other)


@torch.no_grad()
def differences(pair: Pair, *, seed: int, track: Track = no_progress) -> dict[str, Any]:
    """The record of all differences. `seed` draws the random matrices."""
    random: dict[tuple[int, ...], dict[str, Any]] = {}
    rows = []
    for weight in track([*weights_of(pair)], "weights"):
        row = {"name": weight.name, "layer": weight.layer, "kind": weight.kind}
        row |= {"shape": [*weight.base.shape], **_amounts(weight)}
        if weight.base.ndim == 2:
            shape = tuple(weight.base.shape)
            if shape not in random:
                generator = torch.Generator().manual_seed(seed)
                random[shape] = _spectrum(torch.randn(shape, generator=generator))
            row |= {**_directions(weight), "random": random[shape]}
        rows.append(row)
    record: dict[str, Any] = {
        "tolerances": TOLERANCES,
        "whole": _together(rows),
        "layers": [
            {"layer": layer, **_together([row for row in rows if row["layer"] == layer])}
            for layer in dict.fromkeys(row["layer"] for row in rows)
        ],
        "weights": rows,
        "missing": {},
    }
    try:
        record["heads"] = heads(pair)
    except ConfigError as error:
        record["heads"], record["missing"]["heads"] = None, str(error).splitlines()[0]
    return record


def _amounts(weight: Weight) -> dict[str, Any]:
    """Norms, and counts of entries that changed: by more than each tolerance, and when both are
    rounded to bf16."""
    base, tuned = weight.base.float(), weight.tuned.float()
    size = (tuned - base).abs()
    norm, change = float(base.norm()), float(size.norm())
    return {
        "entries": base.numel(),
        "norm": norm,
        "change_norm": change,
        "relative_norm": change / norm if norm else None,
        "changed": [float((size > limit).double().mean()) for limit in TOLERANCES],
        "changed_bf16": float((base.bfloat16() != tuned.bfloat16()).double().mean()),
    }


def _together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same for several weights as one."""
    entries = sum(row["entries"] for row in rows)
    norm, change = (sum(row[n] ** 2 for row in rows) ** 0.5 for n in ("norm", "change_norm"))

    def share(values: Sequence[float]) -> float:
        return sum(v * row["entries"] for v, row in zip(values, rows, strict=True)) / entries

    return {
        "entries": entries,
        "norm": norm,
        "change_norm": change,
        "relative_norm": change / norm if norm else None,
        "changed": [share(column) for column in zip(*(r["changed"] for r in rows), strict=True)],
        "changed_bf16": share([row["changed_bf16"] for row in rows]),
    }


def _directions(weight: Weight) -> dict[str, Any]:
    """The spectrum of a matrix's change and its alignment with the matrix; None if it is 0."""
    base, change = weight.base.float(), weight.tuned.float() - weight.base.float()
    if not change.any():
        return {"effective_rank": None, "energy": None, "alignment": None}
    count = max(1, min(ALIGNED, min(base.shape) // 4))
    aligned = alignment(change, base, count) if base.any() else None
    return {
        **_spectrum(change),
        "alignment": aligned and {
            "directions": count, **aligned._asdict(),
            "chance": {"rows": count / base.shape[0], "columns": count / base.shape[1]},
        },
    }  # fmt: skip


def _spectrum(matrix: Tensor) -> dict[str, Any]:
    squares = squared_singular_values(matrix)
    return {
        "effective_rank": effective_rank(squares),
        "energy": {str(k): energy_share(squares, k) for k in DIRECTIONS if k < len(squares)},
    }


@torch.no_grad()
def heads(pair: Pair) -> list[dict[str, Any]]:
    """The relative change of each attention head: of its query, key, value and output matrices, and
    of all four. With grouped keys and values, heads of a group share two of them. Raises
    ConfigError for an architecture whose heads TransformerLens does not know."""
    bridges = [boot_bridge(policy.language_model, pair.base.tokenizer) for policy in pair]
    squares = {}
    for side in SIDES:
        try:
            base, tuned = (getattr(bridge, side).float() for bridge in bridges)
        except Exception as error:  # adapters raise different errors
            reason = str(error).partition("\n")[0][:120]
            raise ConfigError(f"TransformerLens has no {side} of this model: {reason}") from error
        squares[side] = [x.square().sum(dim=(2, 3)) for x in (base, tuned - base)]
    num_heads = squares["W_Q"][0].shape[1]
    for pair_of_squares in squares.values():
        for i, table in enumerate(pair_of_squares):
            pair_of_squares[i] = table.repeat_interleave(num_heads // table.shape[1], dim=1)
    whole, change = (sum(tables[i] for tables in squares.values()) for i in (0, 1))
    relative = {side: (tables[1] / tables[0]).sqrt() for side, tables in squares.items()}
    relative["all"] = (change / whole).sqrt()
    return [
        {"layer": layer, "head": head, **{n: float(t[layer, head]) for n, t in relative.items()}}
        for layer in range(len(relative["all"]))
        for head in range(num_heads)
    ]


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws weights.png: change by layer, shares of changed entries, effective ranks, heads."""
    figure, (layers, shares, ranks, grid) = make_panels(4, columns=2, size=(11.0, 7.5))
    rows = [row for row in record["layers"] if row["layer"] is not None]
    layers.plot([row["layer"] for row in rows], [row["relative_norm"] for row in rows], "o-",
                color=COLORS[0], markersize=4, linewidth=1.2)  # fmt: skip
    layers.set_ylim(0, 1.1 * max((row["relative_norm"] or 0 for row in rows), default=1) or 1)
    layers.set_title("relative norm of a block's change", loc="left", fontsize=9)
    blocks(layers)
    whole = record["whole"]
    steps = range(len(record["tolerances"]))
    shares.plot(steps, whole["changed"], "o-", color=COLORS[0], markersize=4, label="fp32")
    shares.axhline(whole["changed_bf16"], color=COLORS[1], linewidth=1.2, label="rounded to bf16")
    shares.set_xticks(steps, [f"{limit:g}" for limit in record["tolerances"]])
    shares.set_ylim(0, 1.02)
    shares.set_xlabel("changed by more than", fontsize=9)
    shares.set_title("share of entries that changed", loc="left", fontsize=9)
    shares.legend(frameon=False, fontsize=8)
    _draw_ranks(ranks, record["weights"])
    _draw_heads(figure, grid, record)
    return [save(figure, folder / "weights.png")]


def _draw_ranks(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    kinds: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["layer"] is not None and row.get("effective_rank"):
            ratio = row["effective_rank"] / row["random"]["effective_rank"]
            kinds.setdefault(row["kind"], []).append((row["layer"], ratio))
    for i, (kind, points) in enumerate(kinds.items()):
        label = kind.partition("*.")[2].removesuffix(".weight")
        style = "o-" if i < len(COLORS) else "s--"
        axis.plot(*zip(*points, strict=True), style, color=COLORS[i % len(COLORS)], markersize=3,
                  linewidth=1, label=label)  # fmt: skip
    axis.set_ylim(bottom=0)
    blocks(axis)
    axis.set_title("effective rank of a change, 1: as a random matrix", loc="left", fontsize=9)
    if kinds:
        axis.legend(frameon=False, fontsize=7, ncols=2)


def _draw_heads(figure: Any, axis: Any, record: Mapping[str, Any]) -> None:
    axis.set_title("relative change of attention heads", loc="left", fontsize=9)
    axis.grid(visible=False)
    if record["heads"] is None:
        axis.text(0, 0.5, record["missing"]["heads"][:70], fontsize=8, transform=axis.transAxes)
        axis.set_axis_off()
        return
    num_layers = max(row["layer"] for row in record["heads"]) + 1
    num_heads = len(record["heads"]) // num_layers
    table = torch.tensor([row["all"] for row in record["heads"]]).view(num_layers, num_heads)
    image = axis.imshow(table.T.numpy(), aspect="auto", origin="lower", cmap="Blues", vmin=0)
    figure.colorbar(image, ax=axis).ax.tick_params(labelsize=8)
    blocks(axis)
    axis.set_ylabel("head", fontsize=9)
    axis.set_yticks(range(0, num_heads, max(1, num_heads // 8)))


def summarize(record: Mapping[str, Any]) -> str:
    """The size of the change, its share at bf16, and the head that changed most."""
    whole = record["whole"]
    text = f"relative norm {whole['relative_norm']:.2g}, {whole['changed_bf16']:.1%} differ at bf16"
    if record["heads"]:
        top = max(record["heads"], key=lambda row: row["all"])
        text += f", most changed head {top['layer']}.{top['head']} ({top['all']:.2g})"
    return text

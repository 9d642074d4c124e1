"""Whether several runs from one base changed the same weights, against chance."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.inside.loading import Pair
from rlhf_exp.inside.subject import Subject
from rlhf_exp.inside.weights import Weight, weights_of
from rlhf_exp.models.reference import reference_hash
from rlhf_exp.settings import ConfigError

LARGEST = 0.05  # of a matrix's entries count as its largest changes
CRITERIA = ("bf16", "largest")


class Changed(NamedTuple):
    """The entries of a weight that changed, eight to a byte, and how many they are."""

    bits: np.ndarray
    num_changed: int
    entries: int


def changed_entries(pair: Pair) -> dict[str, dict[str, Changed]]:
    """By criterion and name: the entries that differ once rounded to bf16, and the 5 % of each
    weight that changed most."""
    chosen = {"bf16": _rounded, "largest": _largest}
    return {
        criterion: {weight.name: _packed(chosen[criterion](weight)) for weight in weights_of(pair)}
        for criterion in CRITERIA
    }


def _rounded(weight: Weight) -> Tensor:
    return weight.base.bfloat16() != weight.tuned.bfloat16()


def _largest(weight: Weight) -> Tensor:
    size = (weight.tuned.float() - weight.base.float()).abs().flatten()
    count = max(1, round(LARGEST * size.numel()))
    least = size.kthvalue(size.numel() - count + 1).values
    return (size >= least) & (size > 0)


def _packed(changed: Tensor) -> Changed:
    bits = changed.flatten().cpu().numpy()
    return Changed(bits=np.packbits(bits), num_changed=int(bits.sum()), entries=bits.size)


def overlap(one: dict[str, Changed], other: dict[str, Changed]) -> dict[str, float | None]:
    """The entries that changed in both, as a share of those in the one with fewer, summed over all
    weights; and what independent places with the same counts in each weight would share."""
    both = expected = fewer = 0.0
    for name, a in one.items():
        b = other[name]
        both += int(np.bitwise_count(a.bits & b.bits).sum())
        expected += a.num_changed * b.num_changed / a.entries
        fewer += min(a.num_changed, b.num_changed)
    if not fewer:
        return {"shared": None, "chance": None}
    return {"shared": both / fewer, "chance": expected / fewer}


class Kept(NamedTuple):
    """What is kept of a run to compare it with others: far less than its models."""

    name: str
    base_sha256: str
    changed: dict[str, dict[str, Changed]]


@torch.no_grad()
def keep(subject: Subject) -> Kept:
    """The places that the run changed."""
    pair = subject.pair
    return Kept(
        subject.run.folder.name, reference_hash(pair.base, pair.base), changed_entries(pair)
    )


def measure(runs: Sequence[Kept]) -> dict[str, Any]:
    """The overlap of each two runs. Raises ConfigError unless all began with the same weights."""
    if len({run.base_sha256 for run in runs}) > 1:
        raise ConfigError("the runs began with different weights, so places cannot be compared")
    return {
        "runs": [run.name for run in runs],
        "largest_share": LARGEST,
        "pairs": [
            {
                "runs": [one.name, other.name],
                **{c: overlap(one.changed[c], other.changed[c]) for c in CRITERIA},
            }
            for one, other in itertools.combinations(runs, 2)
        ],
    }


def summarize(record: Mapping[str, Any]) -> str:
    """The mean share over pairs of runs, beside chance."""
    lines = []
    for criterion in CRITERIA:
        known = [pair[criterion] for pair in record["pairs"] if pair[criterion]["shared"]]
        if known:
            shared, chance = (sum(p[k] for p in known) / len(known) for k in ("shared", "chance"))
            lines.append(f"{criterion} {shared:.1%} shared (chance {chance:.1%})")
    return ", ".join(lines) or "nothing changed"

"""KL anatomy: where along a completion and at which tokens the policy departs from its base.

Exact KL both ways, entropy and surprise, on the policy's own samples and on neutral texts, by
position, by class of the token and by token of the vocabulary.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_exp.functional.comparison import compare
from rlhf_exp.functional.intervals import ratio_means
from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.inside.figures import COLORS, bars, make_panels, save
from rlhf_exp.inside.loading import Pair
from rlhf_exp.inside.subject import Subject, Texts, Track, no_progress
from rlhf_exp.inside.token_classes import CLASSES, TokenClasses
from rlhf_exp.settings import ConfigError
from rlhf_exp.types import Completions, Layout

ROWS = 4  # texts at a time: two tables of logits over the vocabulary are held
QUANTITIES = ("kl", "reverse_kl", "entropy", "base_entropy", "surprise", "base_surprise")
TOP = 20  # tokens of each direction in the record
DRAWN = 10


class Compared(NamedTuple):
    """What two models say about texts: quantities at each token, and sums by vocabulary token, of
    which `rise` is by sample."""

    at_tokens: dict[str, Float[Tensor, "sample completion"]]
    tokens: Int[Tensor, "sample completion"]
    mask: Tensor
    rise: Float[Tensor, "sample vocab"]
    kl_terms: Float[Tensor, " vocab"]
    probs: Float[Tensor, " vocab"]
    base_probs: Float[Tensor, " vocab"]


def measure(subject: Subject) -> dict[str, Any]:
    """The anatomy on both kinds of texts; `missing` says why one is absent."""
    record: dict[str, Any] = {"missing": {}}
    for name in ("own_samples", "neutral_texts"):
        try:
            texts: Texts = getattr(subject, name)
        except ConfigError as error:
            record[name], record["missing"][name] = None, str(error)
            continue
        compared = compare_on(subject.pair, texts.completions, track=subject.track)
        record[name] = {
            "source": texts.source,
            **anatomy(compared, subject.classes),
            "by_token": by_token(compared, subject.classes, subject.pair.base.tokenizer),
        }
    return record


@torch.no_grad()
def compare_on(pair: Pair, completions: Completions, *, track: Track = no_progress) -> Compared:
    """The two models compared at every token of the completions, on the CPU."""
    parts = []
    for index in track(torch.arange(len(completions.texts)).split(ROWS), "comparing"):
        rows = completions[index.to(completions.tokens.device)]
        logits, base_logits = _logits(pair, rows)
        compared = compare(logits, base_logits, rows.tokens, rows.mask)
        parts.append(type(compared)(*(x.cpu() for x in compared)))
    return Compared(
        at_tokens={name: torch.cat([getattr(p, name) for p in parts]) for name in QUANTITIES},
        tokens=completions.tokens.cpu(),
        mask=completions.mask.cpu(),
        rise=torch.cat([p.rise for p in parts]),
        kl_terms=torch.stack([p.kl_terms for p in parts]).sum(dim=0),
        probs=torch.stack([p.probs for p in parts]).sum(dim=0),
        base_probs=torch.stack([p.base_probs for p in parts]).sum(dim=0),
    )


def _logits(pair: Pair, completions: Completions) -> tuple[Tensor, Tensor]:
    """The logits of the tuned model and of the base at each token of the completions."""
    layout = Layout.of(completions, whole=True)
    tuned, base = (
        policy.unembed(policy.completion_states(completions, layout))
        for policy in (pair.tuned, pair.base)
    )
    return tuned, base


def anatomy(compared: Compared, classes: TokenClasses) -> dict[str, Any]:
    """Means with their intervals over samples: of all tokens, by position and by class."""
    mask = compared.mask
    position = torch.arange(mask.shape[1]).expand_as(mask)
    kind = classes.classes[compared.tokens]
    begins = classes.begins_word[compared.tokens].long()
    num_tokens, kl = int(mask.sum()), compared.at_tokens["kl"]
    by_position = _by_group(compared, position, mask.shape[1])
    by_class = _by_group(compared, kind, len(CLASSES))
    by_beginning = _by_group(compared, begins, 2)
    return {
        "samples": len(mask),
        "tokens": num_tokens,
        "whole": _by_group(compared, torch.zeros_like(position), 1)[0],
        "kl_of_first_token_share": _share(kl[:, 0].sum(), kl.sum()),
        "by_position": [{"position": i, **row} for i, row in enumerate(by_position)],
        "by_class": [{"class": name, **r} for name, r in zip(CLASSES, by_class, strict=True)],
        "by_word_beginning": [
            {"begins_word": bool(i), **row} for i, row in enumerate(by_beginning)
        ],
    }


def _by_group(
    compared: Compared, group: Int[Tensor, "sample completion"], num_groups: int
) -> list[dict[str, Any]]:
    """For each group of tokens the count, its share of all KL, and every quantity's mean."""
    mask = compared.mask

    def sums(values: Tensor) -> Tensor:
        table = torch.zeros(len(mask), num_groups, dtype=torch.float64)
        return table.scatter_add(1, group, torch.where(mask, values.double(), 0))

    counts = sums(torch.ones(mask.shape))
    rows: list[dict[str, Any]] = [{"tokens": int(n)} for n in counts.sum(dim=0)]
    kl = compared.at_tokens["kl"].double().sum()
    for name in QUANTITIES:
        of_group = sums(compared.at_tokens[name])
        for i, ends in enumerate(zip(*ratio_means(of_group, counts), strict=True)):
            rows[i][name] = dict(zip(("mean", "low", "high"), map(_number, ends), strict=True))
        if name == "kl":
            for row, part in zip(rows, of_group.sum(dim=0), strict=True):
                row["kl_share"] = _share(part, kl)
    return rows


def by_token(
    compared: Compared, classes: TokenClasses, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[dict[str, Any]]]:
    """The tokens of the vocabulary whose probability rose and fell most, on average over all
    positions, with their terms of the KL: the KL is the sum of all tokens' terms."""
    counts = compared.mask.sum(dim=1, keepdim=True).double()
    mean = compared.rise.double().sum(dim=0) / counts.sum()
    order = mean.argsort(descending=True)
    count = min(TOP, len(order) // 2)
    record = {}
    for name, index in (("rising", order[:count]), ("falling", order.flip(0)[:count])):
        rise = ratio_means(compared.rise[:, index], counts.expand(-1, len(index)))
        record[name] = [
            {
                "token": token,
                "text": tokenizer.decode([token]),
                "class": CLASSES[int(classes.classes[token])],
                "rise": dict(zip(("mean", "low", "high"), map(_number, ends), strict=True)),
                "base_probability": _number(compared.base_probs[token] / counts.sum()),
                "probability": _number(compared.probs[token] / counts.sum()),
                "kl_term": _number(compared.kl_terms[token] / counts.sum()),
            }
            for token, *ends in zip(index.tolist(), *rise, strict=True)
        ]
    return record


def _share(part: Tensor, whole: Tensor) -> float | None:
    return _number(part / whole) if whole > 0 else None


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws kl.png: a row of panels for each kind of texts."""
    kinds = {name: record[name] for name in ("own_samples", "neutral_texts") if record[name]}
    if not kinds:
        return []
    figure, panels = make_panels(3 * len(kinds), columns=3, size=(13.0, 3.6 * len(kinds)))
    for i, (name, part) in enumerate(kinds.items()):
        positions, classes, tokens = panels[3 * i : 3 * i + 3]
        _draw_positions(positions, part, title=f"{name.replace('_', ' ')}: {part['source']}")
        present = [row for row in part["by_class"] if row["tokens"]]
        labels = [f"{row['class']} ({row['tokens']})" for row in present]
        bars(classes, labels, [row["kl"] for row in present], color=COLORS[0])
        classes.set_title("KL by class of the token (nats; tokens)", loc="left", fontsize=9)
        ends = part["by_token"]
        rows = [*ends["rising"][:DRAWN], *reversed(ends["falling"][:DRAWN])]
        texts = [repr(row["text"])[1:-1].replace("$", r"\$")[:16] for row in rows]
        bars(tokens, texts, [row["rise"] for row in rows], color=COLORS[2])
        tokens.set_title("rise of probability, mean over positions", loc="left", fontsize=9)
    figure.suptitle("bars and bands: 95 % intervals over samples", fontsize=9, x=0.01, ha="left")
    return [save(figure, folder / "kl.png")]


def _draw_positions(axis: Any, part: Mapping[str, Any], *, title: str) -> None:
    rows = [row for row in part["by_position"] if row["tokens"]]
    x = [row["position"] + 1 for row in rows]
    names = {"kl": "KL(tuned || base)", "reverse_kl": "KL(base || tuned)"}
    for color, (name, label) in zip(COLORS, names.items(), strict=False):
        mean, low, high = ([row[name][end] for row in rows] for end in ("mean", "low", "high"))
        axis.plot(x, mean, "-", color=color, linewidth=1.3, label=label)
        known = [i for i, end in enumerate(low) if end is not None]
        axis.fill_between(
            [x[i] for i in known], [max(0, low[i]) for i in known], [high[i] for i in known],
            color=color, alpha=0.18, linewidth=0,
        )  # fmt: skip
    axis.set_ylim(bottom=0)
    axis.set_xlabel("token of the text", fontsize=9)
    axis.set_ylabel("nats", fontsize=9)
    axis.set_title(title, loc="left", fontsize=9)
    axis.legend(frameon=False, fontsize=8)


def summarize(record: Mapping[str, Any]) -> str:
    """The mean KL of each kind of texts, and the first token's share of it."""
    lines = []
    for name in ("own_samples", "neutral_texts"):
        if record[name]:
            kl, share = record[name]["whole"]["kl"]["mean"], record[name]["kl_of_first_token_share"]
            first = "" if share is None else f", {share:.0%} of it at the first token"
            lines.append(f"{name.replace('_', ' ')} {kl:.3g} nats a token{first}")
    return "; ".join(lines) or "no texts to read"

"""The records that flow through a phase: prompts, completions, rollout, experience.

Frozen, complete when built, their shapes checked when they are. One index convention: position t
concerns completion token y_t: logprobs[:, t] = log p(y_t | x, y_<t), values[:, t] = V(x, y_<t),
rewards[:, t] is received for emitting y_t.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, Shaped, jaxtyped
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R", bound="Record")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """The class as a frozen keyword-only dataclass whose tensors' shapes are checked when built."""
    return jaxtyped(typechecker=beartype)(dataclass(frozen=True, kw_only=True)(cls))


class Record:
    """A record whose every tensor, tuple and nested record has the batch as its first axis; a field
    that may be absent is None."""

    def __getitem__(self: R, index: Tensor) -> R:
        """The rows at `index` [rows], as a record of the same kind."""
        # Not through __init__: rows of what was checked need no check, which takes half as long as
        # an optimizer step of a small model.
        rows = object.__new__(type(self))
        for field in fields(self):  # type: ignore[arg-type]
            object.__setattr__(rows, field.name, _rows(getattr(self, field.name), index))
        return rows


def _rows(value: Any, index: Tensor) -> Any:
    if value is None:
        return None
    if isinstance(value, tuple):
        # Through arange, so that a boolean index picks the same rows here as in the tensors.
        positions = torch.arange(len(value), device=index.device)[index]
        return tuple(value[i] for i in positions.tolist())
    return value[index]


def concatenate(records: Sequence[R]) -> R:
    """Records of one kind as one, their rows in order; all have equally many columns."""
    if len(records) == 1:
        return records[0]
    return type(records[0])(
        **{
            field.name: _joined([getattr(record, field.name) for record in records])
            for field in fields(records[0])  # type: ignore[arg-type]
        }
    )


def _joined(values: list[Any]) -> Any:
    if values[0] is None:
        return None
    if isinstance(values[0], tuple):
        return sum(values, ())
    if isinstance(values[0], Record):
        return concatenate(values)
    return torch.cat(values)


@record
class PromptBatch(Record):
    """Left-padded prompts. `rows` keep the task's own data for each: `rows[i]["prompt"]` is its
    text, `rows[i]["messages"]` the conversation that the text renders if it is one, and the others
    are further columns of a dataset. `groups` numbers the prompts of which several completions are
    sampled; None if each row is a prompt of its own."""

    tokens: Int[Tensor, "batch prompt"]
    mask: Bool[Tensor, "batch prompt"]
    rows: tuple[Mapping[str, Any], ...]
    groups: Int[Tensor, " batch"] | None = None

    def repeated(self, samples_per_prompt: int) -> "PromptBatch":
        """Each prompt so many times, side by side, as one group."""
        if samples_per_prompt == 1:
            return self
        index = torch.arange(len(self.rows), device=self.tokens.device)
        index = index.repeat_interleave(samples_per_prompt)
        return replace(self[index], groups=index)

    @property
    def is_one(self) -> bool:
        """Whether all rows hold the same tokens."""
        same_tokens = bool((self.tokens == self.tokens[:1]).all())
        return same_tokens and bool((self.mask == self.mask[:1]).all())

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each prompt."""
        return tuple(row["prompt"] for row in self.rows)


@record
class Completions(Record):
    """Prompts and what was sampled after them. `mask` is True through the first end-of-sequence
    token; padding holds 0. `texts` are the completions alone, special tokens left out."""

    prompts: PromptBatch
    tokens: Int[Tensor, "batch completion"]
    mask: Bool[Tensor, "batch completion"]
    texts: tuple[str, ...]

    @property
    def full_texts(self) -> tuple[str, ...]:
        """Each prompt with its completion, the text that a reward on whole samples reads."""
        return tuple(a + b for a, b in zip(self.prompts.texts, self.texts, strict=True))

    @property
    def sequences(self) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """Tokens and mask of prompts and completions joined."""
        return (
            torch.cat([self.prompts.tokens, self.tokens], dim=1),
            torch.cat([self.prompts.mask, self.mask], dim=1),
        )

    @property
    def prompt_len(self) -> int:
        """Columns of the padded prompts: where the completions begin in `sequences`."""
        return self.prompts.tokens.shape[1]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What of completions has to be computed, asked of their tensors once: on a GPU each question
    makes the host wait. `mask` is theirs, on the CPU."""

    mask: Bool[Tensor, "batch completion"]
    one_prompt: bool  # all rows have the same one
    padded_prompts: bool
    device: torch.device
    whole: bool = False  # all columns are computed, so that shapes stay the same

    @classmethod
    def of(cls, completions: Completions, *, whole: bool = False) -> "Layout":
        """The layout of completions."""
        prompts = completions.prompts
        return cls(
            mask=completions.mask.cpu(),
            one_prompt=prompts.is_one,
            padded_prompts=not bool(prompts.mask.all()),
            device=completions.mask.device,
            whole=whole,
        )

    def __getitem__(self, index: Tensor) -> "Layout":
        """The layout of the rows at `index` [rows], which is on the CPU."""
        return replace(self, mask=self.mask[index])

    @cached_property
    def num_columns(self) -> int:
        """Columns up to the last real token of the longest row, or all."""
        if self.whole:
            return self.mask.shape[1]
        return int(self.mask.any(dim=0).sum())

    @cached_property
    def positions(self) -> Int[Tensor, " token"] | None:
        """Where the real tokens are in [batch * num_columns], None if all are real."""
        real = self.mask[:, : self.num_columns].flatten()
        return None if bool(real.all()) else real.nonzero().flatten().to(self.device)

    def pick(self, x: Shaped[Tensor, "batch _ *rest"]) -> Shaped[Tensor, " token *rest"]:
        """The entries of the real tokens, of a tensor with at least num_columns columns."""
        flat = x[:, : self.num_columns].flatten(0, 1)
        return flat if self.positions is None else flat.index_select(0, self.positions)

    def spread(self, x: Shaped[Tensor, " token *rest"]) -> Shaped[Tensor, "batch completion *rest"]:
        """The inverse of `pick`; padding holds 0."""
        batch, length = self.mask.shape
        if self.positions is not None:
            whole = x.new_zeros(batch * self.num_columns, *x.shape[1:])
            x = whole.index_copy(0, self.positions, x)
        columns = x.unflatten(0, (batch, self.num_columns))
        missing = x.new_zeros(batch, length - self.num_columns, *x.shape[1:])
        return torch.cat([columns, missing], dim=1)


@record
class Generation(Record):
    """Completions with what the policy computed while it sampled them. `hidden` are the final
    hidden states from which each token was sampled; `kept_mass` is the policy's own probability
    of the tokens that the sampling filter kept (1 without a filter). A policy without a value head
    has no `values`."""

    completions: Completions
    logprobs: Float[Tensor, "batch completion"]
    values: Float[Tensor, "batch completion"] | None
    hidden: Float[Tensor, "batch completion d_model"]
    kept_mass: Float[Tensor, "batch completion"]


@record
class Rollout(Record):
    """A generation measured against the reference and scored. `kl` is the exact
    D(policy || reference) and `entropy` the policy's, both of the distribution of each token."""

    completions: Completions
    logprobs: Float[Tensor, "batch completion"]
    ref_logprobs: Float[Tensor, "batch completion"]
    ref_hidden: Float[Tensor, "batch completion d_model"]
    values: Float[Tensor, "batch completion"] | None
    kl: Float[Tensor, "batch completion"]
    entropy: Float[Tensor, "batch completion"]
    kept_mass: Float[Tensor, "batch completion"]
    scores: Float[Tensor, " batch"]

    @property
    def groups(self) -> Int[Tensor, " batch"]:
        """The number of each row's prompt: rows of one number are samples of one prompt."""
        groups = self.completions.prompts.groups
        if groups is None:
            return torch.arange(len(self.scores), device=self.scores.device)
        return groups


@record
class Experience(Record):
    """What a learning phase trains on; a minibatch is `experience[index]`. `returns` are what the
    values learn, None without values."""

    rollout: Rollout
    rewards: Float[Tensor, "batch completion"]
    advantages: Float[Tensor, "batch completion"]
    returns: Float[Tensor, "batch completion"] | None


class Pass(NamedTuple):
    """What a pass of the policy over a minibatch computes, with gradients: exact KL to the
    reference and entropy of each token's distribution, None for the values of a policy that has no
    value head. The padding holds arbitrary numbers."""

    logprobs: Float[Tensor, "batch completion"]
    entropy: Float[Tensor, "batch completion"]
    kl: Float[Tensor, "batch completion"]
    values: Float[Tensor, "batch completion"] | None


@record
class LossOutput:
    """A loss to minimise, and the metrics that explain it."""

    loss: Float[Tensor, ""]
    metrics: Mapping[str, Float[Tensor, ""]]

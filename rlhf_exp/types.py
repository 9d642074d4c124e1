"""The records that flow through a phase: prompts, completions, rollout, experience.

Frozen, complete when built; the shapes are checked then. One index convention: position t
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
    """A record in which the first axis of every tensor, tuple and nested record is the batch; an
    absent field is None."""

    def __getitem__(self: R, index: Tensor) -> R:
        """The rows at `index` [rows], as a record of the same kind."""
        # Not through __init__: the shapes were checked before, and checking them again takes half
        # as long as an optimizer step of a small model.
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
    """One record of the rows of all records, in order; all have the same number of columns."""
    if len(records) == 1:
        return records[0]
    return type(records[0])(
        **{
            field.name: _join([getattr(record, field.name) for record in records])
            for field in fields(records[0])  # type: ignore[arg-type]
        }
    )


def _join(values: list[Any]) -> Any:
    if values[0] is None:
        return None
    if isinstance(values[0], tuple):
        return sum(values, ())
    if isinstance(values[0], Record):
        return concatenate(values)
    return torch.cat(values)


@record
class PromptBatch(Record):
    """Left-padded prompts. `rows` holds the task's data for each prompt: `rows[i]["prompt"]` is the
    text, `rows[i]["messages"]` the conversation if the text renders one, and other keys are further
    columns of a dataset. Rows with the same number in `groups` hold the same prompt; None if every
    row is a different prompt."""

    tokens: Int[Tensor, "batch prompt"]
    mask: Bool[Tensor, "batch prompt"]
    rows: tuple[Mapping[str, Any], ...]
    groups: Int[Tensor, " batch"] | None = None

    def repeated(self, samples_per_prompt: int) -> "PromptBatch":
        """Each prompt `samples_per_prompt` times in adjacent rows, which form one group."""
        if samples_per_prompt == 1:
            return self
        index = torch.arange(len(self.rows), device=self.tokens.device)
        index = index.repeat_interleave(samples_per_prompt)
        return replace(self[index], groups=index)

    @property
    def is_one(self) -> bool:
        """True if all rows hold the same tokens."""
        same_tokens = bool((self.tokens == self.tokens[:1]).all())
        return same_tokens and bool((self.mask == self.mask[:1]).all())

    def distinct(self) -> tuple[Int[Tensor, " group"], Int[Tensor, " batch"]] | tuple[None, None]:
        """A row of each group, and the place of each row's group among them; (None, None) if every
        row is a different prompt."""
        groups = self.groups
        if self.is_one:
            groups = torch.zeros(len(self.rows), dtype=torch.long, device=self.tokens.device)
        if groups is None or len(self.rows) == 1:
            return None, None
        _, index = groups.unique(return_inverse=True)
        rows = torch.arange(len(index), device=index.device)
        first = index.new_full((int(index.max()) + 1,), len(index))
        return first.scatter_reduce(0, index, rows, "amin"), index

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each prompt."""
        return tuple(row["prompt"] for row in self.rows)

    @property
    def unrendered(self) -> tuple[Any, ...]:
        """Each prompt as its task has it: the messages of a conversation, else the text."""
        return tuple(row.get("messages", row["prompt"]) for row in self.rows)


@record
class Completions(Record):
    """Prompts and their sampled completions. `mask` is True through the first end-of-sequence
    token; padding holds 0. `texts` are the completions without prompts and special tokens."""

    prompts: PromptBatch
    tokens: Int[Tensor, "batch completion"]
    mask: Bool[Tensor, "batch completion"]
    texts: tuple[str, ...]

    @property
    def full_texts(self) -> tuple[str, ...]:
        """Each prompt followed by its completion: the text that a reward on whole samples reads."""
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
    """The positions of completions that have to be computed. It is read from the tensors once,
    because each read makes the host wait for the GPU. `mask` is the completions' mask, on the CPU.
    """

    mask: Bool[Tensor, "batch completion"]
    one_prompt: bool  # all rows have the same prompt
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
        """The layout of the rows at `index` [rows] (on the CPU)."""
        return replace(self, mask=self.mask[index])

    @cached_property
    def num_columns(self) -> int:
        """Columns up to the last real token of the longest row, or all."""
        if self.whole:
            return self.mask.shape[1]
        return int(self.mask.any(dim=0).sum())

    @cached_property
    def positions(self) -> Int[Tensor, " token"] | None:
        """Indices of the real tokens in [batch * num_columns], None if all are real."""
        real = self.mask[:, : self.num_columns].flatten()
        return None if bool(real.all()) else real.nonzero().flatten().to(self.device)

    def pick(self, x: Shaped[Tensor, "batch _ *rest"]) -> Shaped[Tensor, " token *rest"]:
        """The entries of `x` at the real tokens; `x` has at least num_columns columns."""
        flat = x[:, : self.num_columns].flatten(0, 1)
        return flat if self.positions is None else flat.index_select(0, self.positions)

    def spread(self, x: Shaped[Tensor, " token *rest"]) -> Shaped[Tensor, "batch completion *rest"]:
        """The inverse of `pick`; padding holds 0."""
        batch, length = self.mask.shape
        if self.positions is not None:
            whole = x.new_zeros(batch * self.num_columns, *x.shape[1:])
            x = whole.index_copy(0, self.positions, x)
        columns = x.unflatten(0, (batch, self.num_columns))
        padding = x.new_zeros(batch, length - self.num_columns, *x.shape[1:])
        return torch.cat([columns, padding], dim=1)


@record
class Generation(Record):
    """Completions with the policy's log-probs, values and hidden states. `hidden` are the final
    hidden states from which each token was sampled; `kept_mass` is the probability that the policy
    gives to all tokens that pass the sampling filter (1 without a filter). `values` is None for a
    policy without a value head."""

    completions: Completions
    logprobs: Float[Tensor, "batch completion"]
    values: Float[Tensor, "batch completion"] | None
    hidden: Float[Tensor, "batch completion d_model"]
    kept_mass: Float[Tensor, "batch completion"]


@record
class Rollout(Record):
    """A generation measured against the reference and scored. `kl` is the exact
    D(policy || reference) and `entropy` the policy's entropy, in nats at each token."""

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
        """The prompt's number for each row: rows with the same number sample the same prompt."""
        groups = self.completions.prompts.groups
        if groups is None:
            return torch.arange(len(self.scores), device=self.scores.device)
        return groups


@record
class Experience(Record):
    """The data that a learning phase trains on; a minibatch is `experience[index]`. `returns` are
    the targets of the values, None without values. `learned` is False for completions that learning
    leaves out; None: it uses all."""

    rollout: Rollout
    rewards: Float[Tensor, "batch completion"]
    advantages: Float[Tensor, "batch completion"]
    returns: Float[Tensor, "batch completion"] | None
    learned: Bool[Tensor, " batch"] | None = None

    @property
    def num_learned(self) -> int:
        """Completions that learning uses."""
        return len(self.rewards) if self.learned is None else int(self.learned.sum())


class Pass(NamedTuple):
    """Output of the policy on a minibatch, with gradients: log-probs, entropy and exact KL to the
    reference at each token; `values` is None for a policy without a value head. The padding holds
    arbitrary numbers."""

    logprobs: Float[Tensor, "batch completion"]
    entropy: Float[Tensor, "batch completion"]
    kl: Float[Tensor, "batch completion"]
    values: Float[Tensor, "batch completion"] | None


@record
class LossOutput:
    """A loss to minimise, and the metrics that explain it."""

    loss: Float[Tensor, ""]
    metrics: Mapping[str, Float[Tensor, ""]]

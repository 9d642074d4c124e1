"""Token sequences for next-token prediction, and batches of them: padded, or packed into rows.

Both layouts compute the same loss. In a packed row the positions of each example begin at 0, from
which transformers infers that attention must stay within it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.batches import pad_right
from rlhf_exp.tasks.encoding import encode, leading_ids
from rlhf_exp.tasks.protocol import Demonstration
from rlhf_exp.types import record

log = logging.getLogger(__name__)

IGNORED = -100  # the label that transformers leaves out of the loss


@dataclass(frozen=True, kw_only=True)
class Example:
    """Token ids, and the index of the first token that is learned: at least 1, since nothing
    predicts the first token."""

    tokens: list[int]
    start: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def labels(self) -> list[int]:
        """The tokens, with IGNORED for those before `start`."""
        return [IGNORED] * self.start + self.tokens[self.start :]


@record
class ExampleBatch:
    """Examples, one a row, or several with `positions` that begin at 0 in each. Labels are not
    shifted: transformers does it. There is no mask: rows are padded on the right, and causal
    attention never reads what follows a token."""

    tokens: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    positions: Int[Tensor, "batch seq"] | None = None

    @property
    def num_learned(self) -> int:
        """The number of tokens that the loss averages over."""
        return int((self.labels != IGNORED).sum())


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, limit: int
) -> list[Example]:
    """BOS if the tokenizer has one, the text's tokens, EOS; all but the first token are learned.

    Texts longer than `limit` tokens are cut but still end with EOS; their number is logged.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = limit - len(bos) - 1
    encoded = encode(tokenizer, texts)
    too_long = sum(len(ids) > room for ids in encoded)
    if too_long:
        log.info("%d of %d texts are cut to %d tokens", too_long, len(encoded), limit)
    return [Example(tokens=[*bos, *ids[:room], tokenizer.eos_token_id], start=1) for ids in encoded]


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    prepend_bos: bool | None,
    limit: int,
) -> list[Example]:
    """The tokens of prompt and response, then EOS; only the response and EOS are learned.

    Raises ConfigError for a demonstration without a prompt, and for one longer than `limit` tokens:
    if it was cut, the model would learn answers that do not end.
    """
    bos = leading_ids(tokenizer, prepend_bos=prepend_bos)
    prompts, responses = (encode(tokenizer, [d[i] for d in demonstrations]) for i in (0, 1))
    examples = [
        Example(tokens=[*bos, *p, *r, tokenizer.eos_token_id], start=len(bos) + len(p))
        for p, r in zip(prompts, responses, strict=True)
    ]
    for demonstration, example in zip(demonstrations, examples, strict=True):
        if not example.start:
            raise ConfigError(
                f"task: the answer {demonstration.response[:60]!r} has a prompt of no tokens; give"
                " it text or set task.prepend_bos=true"
            )
        if len(example) > limit:
            raise ConfigError(
                f"model: a demonstration of {len(example)} tokens exceeds the model's context of"
                f" {limit}; use a model with a longer context. It begins:"
                f" {demonstration.prompt[:60]!r}"
            )
    return examples


def pad(examples: Sequence[Example]) -> ExampleBatch:
    """One example a row."""
    return ExampleBatch(
        tokens=pad_right([e.tokens for e in examples], fill=0),
        labels=pad_right([e.labels for e in examples], fill=IGNORED),
    )


def pack(examples: Sequence[Example], *, limit: int) -> ExampleBatch:
    """Rows of at most `limit` tokens, each with as many examples as fit; the longest first."""
    rows: list[list[Example]] = []
    free: list[int] = []
    for example in sorted(examples, key=len, reverse=True):
        for i, room in enumerate(free):
            if len(example) <= room:
                rows[i].append(example)
                free[i] -= len(example)
                break
        else:
            rows.append([example])
            free.append(limit - len(example))
    return ExampleBatch(
        tokens=pad_right([[t for e in row for t in e.tokens] for row in rows], fill=0),
        labels=pad_right([[t for e in row for t in e.labels] for row in rows], fill=IGNORED),
        positions=pad_right([[i for e in row for i in range(len(e))] for row in rows], fill=0),
    )

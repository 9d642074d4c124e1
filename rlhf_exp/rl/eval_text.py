"""A text file that evaluations read: how far the policy departs from its reference there, and how
well it still predicts it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_exp.kernels.vocab_head import rollout_statistics
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import Reference
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.encoding import encode, leading_ids
from rlhf_exp.tasks.text_files import read_text
from rlhf_exp.types import Completions, Layout, PromptBatch

METRICS = ("eval/forward_kl", "eval/text_loss")
PIECE_LEN = 256  # most tokens of a piece of a text
MAX_UNKNOWN = 0.1  # of the texts' tokens
ROWS = 16  # pieces at a time
FIELD = "stage.eval_text"


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 file with a text a line; empty lines do not count."""

    path: str

    def texts(self) -> list[str]:
        """The texts. Raises ConfigError if there are none or the file cannot be read."""
        content = read_text(Path(self.path).expanduser(), field=FIELD)
        lines = [line for line in map(str.strip, content.split("\n")) if line]
        if not lines:
            raise ConfigError(f"{FIELD}={self.path}: the file has no text; write a text a line")
        return lines

    def fingerprint(self) -> str:
        """A hash of the texts. Raises ConfigError as `texts` does."""
        return hashlib.sha256("\n".join(self.texts()).encode()).hexdigest()

    def load(self, policy: TransformerWithValueHead, *, prepend_bos: bool | None) -> Completions:
        """The texts as completions of what prompts begin with; long ones in pieces. Raises
        ConfigError as `texts` does, and for texts that the tokenizer cannot encode or that have
        nothing to predict."""
        leading = leading_ids(policy.tokenizer, prepend_bos=prepend_bos)
        rows = encode_known(policy, self.texts())
        if rows is None:
            raise ConfigError(
                f"{FIELD}={self.path}: the model's tokenizer does not know its words; give texts"
                " like those that the model was trained on"
            )
        length = min(PIECE_LEN, policy.context_len - (len(leading) or 1))
        pieces = [row[i : i + length] for row in rows for i in range(0, len(row), length)]
        pieces = [piece for piece in pieces if leading or len(piece) > 1]
        if not pieces:
            raise ConfigError(f"{FIELD}={self.path}: no text has two tokens; write longer ones")
        return as_completions(policy, pieces, leading, limit=length)


def encode_known(policy: TransformerWithValueHead, texts: Sequence[str]) -> list[list[int]] | None:
    """The tokens of the texts; None if the tokenizer does not know their words."""
    try:
        rows = encode(policy.tokenizer, texts)
    except ConfigError:
        return None
    unknown = policy.tokenizer.unk_token_id
    tokens = [token for row in rows for token in row]
    return rows if tokens.count(unknown) <= MAX_UNKNOWN * len(tokens) else None


def as_completions(
    policy: TransformerWithValueHead,
    rows: Sequence[Sequence[int]],
    leading: Sequence[int],
    *,
    limit: int,
) -> Completions:
    """Texts, as token ids, as completions of the ids `leading`, or without those of their own first
    tokens. At most the first `limit` tokens of a completion are taken."""
    start = len(leading) or 1
    whole = [[*leading, *row][: start + limit] for row in rows]
    width = max(map(len, whole)) - start
    tokens = torch.zeros(len(whole), width, dtype=torch.long)
    mask = torch.zeros(len(whole), width, dtype=torch.bool)
    for i, row in enumerate(whole):
        tokens[i, : len(row) - start] = torch.tensor(row[start:])
        mask[i, : len(row) - start] = True
    first = torch.tensor([row[:start] for row in whole])
    prompts = PromptBatch(
        tokens=first.to(policy.device),
        mask=torch.ones_like(first, dtype=torch.bool, device=policy.device),
        rows=tuple({"prompt": ""} for _ in whole),
    )
    texts = tuple(policy.tokenizer.decode(row[start:]) for row in whole)
    return Completions(
        prompts=prompts, tokens=tokens.to(policy.device), mask=mask.to(policy.device), texts=texts
    )


@torch.no_grad()
def text_metrics(
    policy: TransformerWithValueHead, reference: Reference, texts: Completions
) -> dict[str, float]:
    """At the tokens of the texts, the means of D(reference, policy) = sum_v q(v) log q(v)/p(v) and
    of -log p of the token, in nats."""
    kl, logprobs = [], []
    for index in torch.arange(len(texts.texts)).split(ROWS):
        rows = texts[index.to(policy.device)]
        layout = Layout.of(rows)
        hidden = layout.pick(policy.completion_states(rows, layout))
        ref_hidden = layout.pick(reference.completion_states(rows, layout))
        with policy.autocast():
            # The policy takes the reference's place, which turns the KL around.
            statistics = rollout_statistics(
                ref_hidden, reference.head, layout.pick(rows.tokens), hidden, policy.head,
                temperature=1.0,
            )  # fmt: skip
        kl.append(statistics.kl)
        logprobs.append(statistics.ref_logprobs)
    means = torch.cat(kl).mean(), -torch.cat(logprobs).mean()
    return dict(zip(METRICS, torch.stack(means).tolist(), strict=True))

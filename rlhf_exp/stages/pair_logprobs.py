"""Log-probs of the answers of preference pairs, under a policy and under its frozen reference.

Knows pairs and models, not what is learned from their log-probs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.kernels.vocab_head import head_logprobs
from rlhf_exp.machine.precision import Dtype, autocast
from rlhf_exp.models.reference import Reference
from rlhf_exp.tasks.pair_tokens import EncodedPair, collate
from rlhf_exp.types import Layout


class PairLogprobs(NamedTuple):
    """The log-prob of each pair's answers, in nats: the sum over their tokens, EOS included."""

    chosen: Float[Tensor, " pair"]
    rejected: Float[Tensor, " pair"]


class ReferencedPairs:
    """Pairs with their log-probs under the reference, which are computed once. Passes run in
    `dtype`; those without gradients read `batch_size` pairs at a time."""

    def __init__(
        self,
        pairs: Sequence[EncodedPair],
        reference: Reference,
        *,
        batch_size: int,
        dtype: Dtype,
        device: torch.device,
    ) -> None:
        self.pairs, self.device = pairs, device
        self._batch_size, self._dtype = batch_size, dtype
        self._reference = self.all_logprobs(reference)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def lengths(self) -> list[int]:
        """The tokens of each pair's prompt and longer answer."""
        return [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in self.pairs]

    def num_chosen_tokens(self, index: Sequence[int]) -> int:
        """The tokens of the chosen answers of the pairs at `index`."""
        return sum(len(self.pairs[i].chosen) for i in index)

    def reference(self, index: Sequence[int]) -> PairLogprobs:
        """The reference's log-probs of the pairs at `index`."""
        rows = torch.tensor(index, device=self.device)
        return PairLogprobs(*(logprobs[rows] for logprobs in self._reference))

    def logprobs(self, model: Reference, index: Sequence[int]) -> PairLogprobs:
        """The log-probs of the pairs at `index` under a model, with gradients."""
        pairs = [self.pairs[i] for i in index]
        width = max(max(len(p.chosen), len(p.rejected)) for p in pairs)
        completions = collate(pairs, width=width, device=self.device)
        layout = Layout.of(completions)
        with autocast(self._dtype, self.device):
            hidden = layout.pick(model.completion_states(completions, layout))
            logprobs = head_logprobs(hidden, model.head, layout.pick(completions.tokens))
        return PairLogprobs(*layout.spread(logprobs).sum(dim=1).chunk(2))

    @torch.no_grad()
    def all_logprobs(self, model: Reference) -> PairLogprobs:
        """The log-probs of all pairs under a model, without gradients."""
        batches = torch.arange(len(self)).split(self._batch_size)
        parts = [self.logprobs(model, batch.tolist()) for batch in batches]
        return PairLogprobs(*map(torch.cat, zip(*parts, strict=True)))

"""The distributions behind a phase's means, from tensors of the last pass of learning."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_exp.runs.summary import Histogram, histogram
from rlhf_exp.types import Experience, LossOutput, Pass


class HistogramCollector:
    """Records the last pass over a rollout, or the one that a guard stopped. Recording computes
    nothing and never waits for a GPU; `histograms` does the work afterwards."""

    def __init__(self) -> None:
        self._rows_a_pass = 0
        self._parts: list[tuple[Tensor, ...]] = []
        self._num_rows = 0
        self.active = False

    def start(self, *, active: bool) -> None:
        """Begins a phase. Records nothing unless active."""
        self._parts, self._num_rows, self.active = [], 0, active

    def expect(self, rows: int) -> None:
        """Sets how many completions a pass of this phase has."""
        self._rows_a_pass = rows

    def watch(
        self, objective: Callable[[Pass, Experience], LossOutput]
    ) -> Callable[[Pass, Experience], LossOutput]:
        """The objective, with its calls recorded."""

        def watched(new: Pass, batch: Experience) -> LossOutput:
            output = objective(new, batch)
            if self.active:
                self._note(new.logprobs.detach(), batch)
            return output

        return watched

    def _note(self, logprobs: Tensor, batch: Experience) -> None:
        if self._num_rows == self._rows_a_pass:  # another pass begins
            self.start(active=True)
        rollout = batch.rollout  # not kept, for its hidden states
        tensors = (rollout.completions.mask, batch.advantages, rollout.kl, rollout.logprobs)
        self._parts.append((logprobs, *tensors))
        self._num_rows += len(logprobs)

    def histograms(self) -> dict[str, Histogram]:
        """Over the real tokens: the advantages as learning used them, the ratios to the policy that
        sampled, and the exact KL of that policy to the reference. Empty if no pass was made."""
        if not self._parts:
            return {}
        values: dict[str, list[Tensor]] = {"advantages": [], "ratio": [], "token_kl": []}
        for logprobs, real, advantages, kl, old_logprobs in self._parts:
            values["advantages"].append(advantages[real])
            values["ratio"].append((logprobs - old_logprobs)[real].exp())
            values["token_kl"].append(kl[real])
        return {name: histogram(torch.cat(parts)) for name, parts in values.items()}

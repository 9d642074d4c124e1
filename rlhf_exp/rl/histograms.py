"""The distributions behind a phase's means, from what the last pass of learning computes anyway."""

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.training.metrics import Histogram, histogram
from rlhf_exp.types import Experience


class LastPass:
    """What the last pass over a rollout saw, or the one that stage.target_kl ended. Learning adds
    each minibatch as it is, without a computation and without making a GPU's host wait;
    `histograms` does the work afterwards."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, ...]] = []

    def restart(self) -> None:
        """Forgets what was seen, since another pass begins."""
        self._steps.clear()

    def add(self, logprobs: Float[Tensor, "batch completion"], minibatch: Experience) -> None:
        """Notes a minibatch with the log-probs of the policy just before its update."""
        rollout = minibatch.rollout  # not kept, for its hidden states
        kept = (rollout.completions.mask, minibatch.advantages, rollout.kl, rollout.logprobs)
        self._steps.append((logprobs, *kept))

    def histograms(self) -> dict[str, Histogram]:
        """Over the real tokens: the advantages as learning used them, the ratios to the policy that
        sampled, and the exact KL of that policy to the reference. None if no pass was made."""
        if not self._steps:
            return {}
        seen: dict[str, list[Tensor]] = {"advantages": [], "ratio": [], "token_kl": []}
        for logprobs, real, advantages, kl, old_logprobs in self._steps:
            seen["advantages"].append(advantages[real])
            seen["ratio"].append((logprobs - old_logprobs)[real].exp())
            seen["token_kl"].append(kl[real])
        return {name: histogram(torch.cat(parts)) for name, parts in seen.items()}

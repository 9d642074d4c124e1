"""An exponential average of the trained weights over phases. It averages out what steps in random
directions have added."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.training.optim import load_trained_state, trained_state


class WeightAverage:
    """The average, which begins at the policy's weights: average = decay average + (1 - decay)
    weights after each phase."""

    def __init__(self, policy: TransformerWithValueHead, decay: float) -> None:
        self._policy, self._decay = policy, decay
        self.weights = self._copies()

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of a phase."""
        for name, parameter in trained_state(self._policy).items():
            self.weights[name].lerp_(parameter, 1 - self._decay)

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Goes on with a saved average, or begins one at the policy's weights if none was saved."""
        self.weights = dict(weights) or self._copies()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The policy has the average as its weights inside the context."""
        own = self._copies()
        self._load(self.weights)
        try:
            yield
        finally:
            self._load(own)

    def _copies(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in trained_state(self._policy).items()}

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        load_trained_state(self._policy, weights)
        self._policy.weights_changed()

"""Early stopping: ends supervised training and restores the best weights.

Knows the metrics that rank the weights, not how they are measured.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rlhf_exp.runs.context import Context, TrainingError
from rlhf_exp.training.optim import load_trained_state, trained_state

log = logging.getLogger(__name__)

EXACT, LOSS = "heldout/exact_match", "heldout/loss"


class EarlyStopping:
    """Calls `measure` with the update's number every `eval_every` updates, logs the metrics that it
    returns, and keeps a copy of the best trained weights: those with the highest exact-match rate,
    if `measure` returns one, and among equal rates the lowest loss.

    Training ends after `patience` measurements without an improvement, at an exact-match rate of at
    least `stop_at`, or after `max_seconds`. Without `eval_every` nothing is measured and the last
    weights stay. The error that no loss was finite suggests to lower `lr_fields`.
    """

    def __init__(
        self,
        context: Context,
        network: nn.Module,
        measure: Callable[[int], dict[str, float]],
        *,
        eval_every: int | None,
        patience: int | None = None,
        stop_at: float | None = None,
        max_seconds: float | None = None,
        lr_fields: str = "optimizer.base_lr",
    ) -> None:
        self._context, self._network, self._measure = context, network, measure
        self._eval_every, self._stop_at, self._lr_fields = eval_every, stop_at, lr_fields
        self._patience = math.inf if patience is None else patience
        self._max_seconds = math.inf if max_seconds is None else max_seconds
        self._began = time.monotonic()
        self._num_worse = 0
        self._best = (-math.inf, -math.inf)  # the exact-match rate and minus the loss
        self._weights: dict[str, Tensor] = {}

    def __call__(self, update: int) -> bool:
        """Measures if an evaluation is due. Returns True if training ends with this update."""
        if self._eval_every is not None and update % self._eval_every == 0:
            self._compare(update)
        if self._is_reached() or self._num_worse >= self._patience:
            return True
        is_late = time.monotonic() > self._began + self._max_seconds
        if is_late:
            log.info("stage.max_seconds is over at update %d", update)
        return is_late

    def restore_best(self, update: int) -> None:
        """Measures the last update's weights if not yet measured, then restores the best. Raises
        TrainingError if no loss was finite."""
        if self._eval_every is None:
            return
        if update % self._eval_every:
            self._compare(update)
        if self._stop_at is not None and not self._is_reached():
            log.warning(
                "stage.stop_at=%g was not reached: the best exact-match rate is %.3f after %d"
                " updates; raise stage.epochs, stage.max_updates or stage.max_seconds",
                self._stop_at, self._best[0], update,
            )  # fmt: skip
        if not self._weights:
            raise TrainingError(
                f"update {update}: no held-out loss was finite; lower {self._lr_fields}"
            )
        load_trained_state(self._network, self._weights)

    def state_dict(self) -> dict[str, Any]:
        """The best weights and their metrics, the number of measurements since then, and the
        seconds trained."""
        return {
            "weights": self._weights,
            "best": list(self._best),
            "num_worse": self._num_worse,
            "seconds": time.monotonic() - self._began,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._weights, self._num_worse = dict(state["weights"]), state["num_worse"]
        self._best = (state["best"][0], state["best"][1])
        self._began = time.monotonic() - state["seconds"]

    def _is_reached(self) -> bool:
        return self._stop_at is not None and self._best[0] >= self._stop_at

    def _compare(self, update: int) -> None:
        """Measures, and keeps the weights if they are the best."""
        metrics = self._measure(update)
        self._context.folder.log(update, metrics)
        quality = (metrics.get(EXACT, 0.0), -metrics[LOSS])
        self._num_worse += 1
        if math.isfinite(metrics[LOSS]) and quality > self._best:
            self._best, self._num_worse = quality, 0
            trained = trained_state(self._network).items()
            self._weights = {name: parameter.detach().clone() for name, parameter in trained}

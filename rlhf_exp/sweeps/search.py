"""A hyperparameter search with Optuna's ask-and-tell interface <https://optuna.readthedocs.io>. Its
study is a file in the sweep's folder, so an interrupted search can be resumed.

It knows intervals, choices and results, not how jobs are run.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.runs.paths import read_result
from rlhf_exp.settings import ConfigError

log = logging.getLogger(__name__)

STUDY = "study.jsonl"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Numbers from `low` to `high`, both included; `log` draws them evenly on a log scale."""

    low: int | float
    high: int | float
    log: bool
    integer: bool


Space = Mapping[str, Interval | tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One drawn setting: `values` by key, as on the command line."""

    number: int
    values: dict[str, str]


class Search:
    """A study in `folder`, new or existing. Trials without a result are drawn again first. Raises
    ConfigError without Optuna, for an unknown sampler, for a study of other metrics, and for a
    damaged study."""

    def __init__(
        self,
        folder: Path,
        *,
        sampler: str,
        seed: int,
        metrics: Mapping[str, str],
    ) -> None:
        optuna = _optuna()
        check_search(sampler, metrics)
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = tuple(metrics)
        self._highest_first = next(iter(metrics.values())) == "maximize"
        storage = _open_journal(folder / STUDY)
        self._study = optuna.create_study(
            study_name="sweep",
            storage=storage,
            load_if_exists=True,
            directions=list(metrics.values()),
        )
        kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        # A resumed search must not repeat its earlier draws.
        self._study.sampler = kinds[sampler](seed=seed + len(self._study.trials))
        self._refuse_other(metrics, folder)
        self._take_up()

    def _refuse_other(self, metrics: Mapping[str, str], folder: Path) -> None:
        # Optuna stores the directions without comparing them, and does not store names.
        requested = [list(item) for item in metrics.items()]
        old = self._study.user_attrs.get("metrics", requested)
        if old != requested:
            raise ConfigError(
                f"hydra.sweeper.maximize and minimize: the study in {folder} is of"
                f" {', '.join(': '.join(item) for item in old)}: take these in this order, name"
                f" another hydra.sweep.dir, or remove {folder / STUDY} to search anew on the runs"
                " that are done"
            )
        self._study.set_user_attr("metrics", requested)

    def _take_up(self) -> None:
        from optuna.trial import TrialState

        trials = self._study.trials
        done = [t.params for t in trials if t.state == TrialState.COMPLETE]
        queued = [t for t in trials if t.state == TrialState.WAITING]
        done += [trial.system_attrs.get("fixed_params", {}) for trial in queued]
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                self._study.tell(trial.number, state=TrialState.FAIL)
            if trial.state in (TrialState.RUNNING, TrialState.FAIL) and trial.params not in done:
                self._study.enqueue_trial(trial.params, skip_if_exists=False)
                done.append(trial.params)

    @property
    def num_done(self) -> int:
        """The number of trials with a result."""
        from optuna.trial import TrialState

        return len(self._study.get_trials(states=(TrialState.COMPLETE,)))

    def ask(self, space: Space) -> Trial:
        """Draws a setting. Raises ConfigError if the space does not fit the study's earlier one."""
        distributions = {key: _distribution(dimension) for key, dimension in space.items()}
        try:
            trial = self._study.ask(distributions)
        except ValueError as error:
            raise ConfigError(
                f"the search in this folder was begun over other values ({error}): name another"
                " hydra.sweep.dir"
            ) from error
        return Trial(number=trial.number, values={k: str(v) for k, v in trial.params.items()})

    def tell(self, trial: Trial, folder: Path | None) -> None:
        """Records a trial's result from its run's `folder`, None for a run that did not finish. The
        trial fails if a metric is not finite. Raises ConfigError if the result lacks one."""
        from optuna.trial import TrialState

        metrics = None if folder is None else read_metrics(folder, self._metrics)
        state = TrialState.FAIL if metrics is None else TrialState.COMPLETE
        self._study.tell(trial.number, metrics, state)

    def best(self) -> list[tuple[dict[str, Any], list[float]]]:
        """The Pareto-optimal settings with their metrics, the best by the first metric first."""
        front = [(trial.params, list(trial.values)) for trial in self._study.best_trials]
        return sorted(front, key=lambda pair: pair[1], reverse=self._highest_first)


def read_metrics(folder: Path, names: Sequence[str]) -> list[float] | None:
    """Metrics of a finished run's last evaluation; None if one of them is not finite. Raises
    ConfigError for a metric that the run does not have."""
    after = read_result(folder)["after"]
    for name in names:
        if name not in after:
            raise ConfigError(
                f"hydra.sweeper: {name} is no result of these runs; they have:"
                f" {', '.join(sorted(after))}"
            )
    values = [math.nan if after[name] is None else float(after[name]) for name in names]
    return values if all(map(math.isfinite, values)) else None


def check_space(space: Space) -> None:
    """Raises ConfigError for an interval from which no number can be drawn."""
    for key, dimension in space.items():
        if isinstance(dimension, tuple):
            continue
        low, high = dimension.low, dimension.high
        name = f"interval({low:g},{high:g})"
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ConfigError(f"{key}: {name}: both ends must be finite")
        if low > high:
            raise ConfigError(
                f"{key}: {name} ends below its beginning: write interval({high:g},{low:g})"
            )
        if dimension.log and low <= 0:
            raise ConfigError(f"{key}: {name} is drawn on a log scale, which begins above 0")


def edge_settings(space: Space) -> list[dict[str, str]]:
    """Settings in which both ends of each interval and every choice occur at least once."""
    values_by_key = {key: _edge_values(dimension) for key, dimension in space.items()}
    first = {key: values[0] for key, values in values_by_key.items()}
    return [
        first,
        *({**first, key: value} for key, values in values_by_key.items() for value in values[1:]),
    ]


def _edge_values(dimension: Interval | tuple[str, ...]) -> list[str]:
    if isinstance(dimension, tuple):
        return list(dimension)
    kind = int if dimension.integer else float
    return [str(kind(dimension.low)), str(kind(dimension.high))]


def _distribution(dimension: Interval | tuple[str, ...]) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(dimension, tuple):
        return CategoricalDistribution(dimension)
    low, high, log_scale = dimension.low, dimension.high, dimension.log
    if dimension.integer:
        return IntDistribution(int(low), int(high), log=log_scale)
    return FloatDistribution(low, high, log=log_scale)


def check_search(sampler: str, metrics: Mapping[str, str]) -> None:
    """Raises ConfigError for an unknown sampler or direction, and if there is no metric."""
    if sampler not in ("tpe", "random"):
        raise ConfigError(f"hydra.sweeper.sampler={sampler}: use tpe or random")
    if not metrics:
        raise ConfigError("name a metric: hydra.sweeper.maximize=[eval/score]")
    for name, direction in metrics.items():
        if direction not in ("maximize", "minimize"):
            raise ConfigError(f"{name}: {direction}: maximize or minimize")


def _open_journal(file: Path) -> Any:
    """Optuna's storage in a file of JSON lines. Removes an incomplete last line, to which Optuna
    would append the next. Raises ConfigError for any other damage."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    content = file.read_bytes() if file.is_file() else b""
    if not content.endswith(b"\n") and content:
        os.truncate(file, content.rfind(b"\n") + 1)
        log.warning("%s: removed its incomplete last line", file)
    try:
        return JournalStorage(JournalFileBackend(str(file)))
    except OSError:
        raise
    except Exception as error:  # Optuna raises errors of many kinds for bad lines
        raise ConfigError(
            f"{file} is damaged ({str(error)[:80]}): remove it to search anew on the runs that are"
            " done"
        ) from error


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "hydra/sweeper=search needs Optuna: pip install 'rlhf_exp[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna

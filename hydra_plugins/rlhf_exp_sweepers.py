"""Hydra's sweepers: the jobs of a grid or a search. Hydra finds plugins only in this package."""

from collections.abc import Mapping, Sequence
from typing import Any

# A private class, the only one that makes Hydra's grid; hydra-core is pinned below 1.4.
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.rlhf_exp_launching import Launching
from rlhf_exp.runs.status import read_state
from rlhf_exp.security.redaction import redact_words
from rlhf_exp.settings import ConfigError
from rlhf_exp.sweeps.jobs import BadJobs, SweepJob, place, read_record
from rlhf_exp.sweeps.monitor import show_plan
from rlhf_exp.sweeps.search import (
    Interval,
    Search,
    Space,
    Trial,
    check_search,
    check_space,
    edge_settings,
)

BEST = 5


class GridSweeper(Sweeper):
    """Every combination of the variants and the swept values."""

    def __init__(
        self,
        max_batch_size: int | None,
        params: Mapping[str, Any],
        variants: Sequence[Sequence[str]] = (),
    ) -> None:
        _check_counts(max_batch_size=max_batch_size)
        for variant in variants:
            if isinstance(variant, str):
                raise ConfigError(
                    f"hydra.sweeper.variants: {variant} must be in brackets: each variant is a list"
                    " of words, as [stage=rloo, optimizer.base_lr=1e-3]"
                )
        self._batch_size, self._params, self._variants = max_batch_size, params, variants

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hydra's way of handing over what a sweeper needs."""
        self._launching = Launching(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Checks all jobs and runs them."""
        launching = self._launching
        overrides = launching.parse(self._params, arguments)
        for override in overrides:
            if override.is_sweep_override() and not override.is_discrete_sweep():
                key = override.get_key_element()
                raise ConfigError(f"{key}: an interval is for a search; add hydra/sweeper=search")
        [grid] = BasicSweeper.split_arguments(overrides, None)
        swept = {o.get_key_element() for o in overrides if o.is_sweep_override()}
        given = {o.get_key_element() for o in overrides}
        variants = [[w for w in v if w.split("=")[0] not in given] for v in self._variants] or [[]]
        rows = [
            ([*variant, *row], [*shown, *(w for w in row if w.split("=")[0] in swept)])
            for variant, shown in zip(variants, _without_deletions(variants), strict=True)
            for row in grid
        ]
        checked = launching.check(rows)
        jobs = place(launching.folder, checked)
        if len(jobs) < len(rows):
            launching.say(f"{len(rows) - len(jobs)} of {len(rows)} jobs repeat others")
        launching.say_gpus()
        if launching.dry_run:
            show_plan(jobs, launching.console, at_once=launching.kind.at_once)
            return
        with launching.owned():
            jobs = place(launching.folder, checked)  # another process may have changed the folder
            todo = [job for job in jobs if read_state(job.folder).status != "done"]
            done = f", {len(jobs) - len(todo)} of them done" if len(todo) < len(jobs) else ""
            launching.say(f"sweep: {len(jobs)} jobs{done}, in {launching.folder}")
            launching.run(todo, batch_size=self._batch_size)
            launching.conclude(jobs)


def _without_deletions(variants: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    """The words that tell the variants apart: without those that delete a key, unless two variants
    differ in nothing else."""
    without = [[word for word in variant if not word.startswith("~")] for variant in variants]
    return without if len(set(map(tuple, without))) == len(variants) else variants


class SearchSweeper(Sweeper):
    """Settings drawn by Optuna, each batch after the results of the previous one."""

    def __init__(
        self,
        sampler: str,
        n_trials: int,
        maximize: Sequence[str],
        minimize: Sequence[str],
        seed: int,
        max_batch_size: int | None,
        params: Mapping[str, Any],
    ) -> None:
        _check_counts(max_batch_size=max_batch_size, n_trials=n_trials)
        if both := {*maximize} & {*minimize}:
            raise ConfigError(
                f"{min(both)}: it is in hydra.sweeper.maximize and minimize: remove it from one"
            )
        self._metrics = dict.fromkeys(maximize, "maximize") | dict.fromkeys(minimize, "minimize")
        check_search(sampler, self._metrics)
        self._sampler, self._seed = sampler, seed
        self._n_trials, self._batch_size, self._params = n_trials, max_batch_size, params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hydra's way of handing over what a sweeper needs."""
        self._launching = Launching(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Checks the ends of the space and searches it."""
        launching = self._launching
        space, fixed = _space(launching.parse(self._params, arguments))
        check_space(space)
        settings = [_of_values(fixed, values) for values in edge_settings(space)]
        ends = launching.check(settings, metrics=[*self._metrics])
        batch_size = self._batch_size or launching.kind.at_once
        launching.say(
            f"search: {self._n_trials} trials over {', '.join(space)}, {batch_size} at a time,"
            f" in {launching.folder}"
        )
        launching.say_gpus()
        if launching.dry_run:
            show_plan(ends, launching.console, at_once=batch_size, trials=self._n_trials)
            return
        with launching.owned():
            search = Search(
                launching.folder, sampler=self._sampler, seed=self._seed, metrics=self._metrics
            )
            begin = search.num_done
            for number in range(begin, self._n_trials, batch_size):  # ends even if trials fail
                size = min(batch_size, self._n_trials - number)
                title = f"trial {number + 1} to {number + size} of {self._n_trials}: "
                trials = [search.ask(space) for _ in range(size)]
                self._run_batch(search, trials, fixed, title=title)
                if launching.has_stopped:
                    break
            best = search.best()
            for values, metrics in best[:BEST]:
                results = dict(zip(self._metrics, metrics, strict=True))
                launching.say(f"best: {results} with {values}")
            if len(best) > BEST:
                launching.say(f"and {len(best) - BEST} more on the Pareto front")
            launching.conclude(read_record(launching.folder))

    def _run_batch(
        self, search: Search, trials: Sequence[Trial], fixed: Sequence[str], *, title: str
    ) -> None:
        launching = self._launching
        drawn: list[tuple[Trial, SweepJob]] = []
        for trial in trials:
            try:
                [job] = launching.check([_of_values(fixed, trial.values)])
            except BadJobs as error:  # each value is valid, but not the combination
                launching.say(f"trial {trial.number}: {error}")
                search.tell(trial, None)
                continue
            drawn.append((trial, job))
        jobs = place(launching.folder, [job for _, job in drawn])
        undone = [job for job in jobs if read_state(job.folder).status != "done"]
        launching.run(undone, batch_size=None, title=title)
        folders = {job.identity: job.folder for job in jobs}
        for trial, job in drawn:
            folder = folders[job.identity]
            search.tell(trial, folder if read_state(folder).status == "done" else None)


def _space(overrides: Sequence[Override]) -> tuple[Space, list[str]]:
    """The swept keys with their intervals or values, and the overrides of the other keys."""
    space: dict[str, Interval | tuple[str, ...]] = {}
    fixed = []
    for override in overrides:
        key, value = override.get_key_element(), override.value()
        if isinstance(value, IntervalSweep):
            assert value.start is not None
            assert value.end is not None
            space[key] = Interval(
                low=value.start, high=value.end, log="log" in value.tags,
                integer=isinstance(value.start, int),
            )  # fmt: skip
        elif override.is_sweep_override():
            space[key] = tuple(override.sweep_string_iterator())
        else:
            space.pop(key, None)  # the command line fixes what the file sweeps
            fixed.append(f"{key}={override.get_value_element_as_str()}")
    for key, values in space.items():
        words = [f"{key}={values.low if isinstance(values, Interval) else ','.join(values)}"]
        if redact_words(words) != words:  # the study's file would hold them
            raise ConfigError(f"{key}: a secret cannot be searched; give it one value")
    if not space:
        raise ConfigError(
            "nothing to search: give a key an interval, stage.kl_coef=interval(0.1,1)"
        )
    return space, fixed


def _of_values(
    fixed: Sequence[str], values: Mapping[str, str]
) -> tuple[Sequence[str], Sequence[str]]:
    swept = [f"{key}={value}" for key, value in values.items()]
    return [*fixed, *swept], swept


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"hydra.sweeper.{name}={count}: it must be 1 or more")

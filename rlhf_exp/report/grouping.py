"""The parameters in which the runs differ, and the groups of runs that differ only in the seed.

It knows configurations, not metrics.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_exp.runs.config_keys import SEEDS, use_of
from rlhf_exp.runs.reading import Run

TARGET = "._target_"  # ends the key that holds the class of a configuration group's option
STAGE = "stage"
MANY = 8  # if there are more parameters, those that always change together are shown as one


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs with equal parameters, as indices into the list of runs."""

    label: str
    parameters: dict[str, Any]
    runs: list[int]


def varied_parameters(runs: Sequence[Run]) -> list[str]:
    """The dotted keys whose values differ between runs of one kind of stage, in the configuration's
    order, and the stage if there are several. A group with different options counts as one
    parameter and replaces keys that only some of the options have; a key that differs among runs
    with the same option stays. If runs chose other presets of a stage, the stage also replaces its
    keys that the presets set. Left out: keys below `prepare` that copy another key, and, if there
    are more than eight, keys that change only together with an earlier one."""
    configured = [run for run in runs if run.config]
    kinds: dict[str, list[Run]] = {}
    for run in configured:
        kinds.setdefault(_key(run.config.get(f"{STAGE}{TARGET}")), []).append(run)
    is_several = len({run.stage for run in configured}) > 1
    parameters: dict[str, None] = {STAGE: None} if is_several else {}
    for kind in kinds.values():
        parameters |= dict.fromkeys(_parameters_within(kind))
    values = {name: _key([_value(run, name) for run in configured]) for name in parameters}
    main_values = {values[name] for name in parameters if not name.startswith("prepare.")}
    names = [n for n in parameters if not n.startswith("prepare.") or values[n] not in main_values]
    if len(names) > MANY:
        first_names = {_partition(configured, name): name for name in reversed(names)}
        names = [*reversed(first_names.values())]
    return names


def settings_of(run: Run, parameters: Sequence[str]) -> dict[str, Any]:
    """The run's parameters: for a group the name of its class, None for a missing key."""
    values = {name: _value(run, name) for name in parameters}
    return {n: show_value(v) if f"{n}{TARGET}" in run.config else v for n, v in values.items()}


def split_configs(runs: Sequence[Run]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The keys and values that all runs with a known configuration share, and each run's values of
    the other keys, None for a missing key."""
    configured = [run for run in runs if run.config]
    differing = {
        name: [run.config.get(name) for run in runs] for name in _differing_keys(configured)
    }
    config = configured[0].config if configured else {}
    return {name: value for name, value in config.items() if name not in differing}, differing


def group_runs(runs: Sequence[Run], parameters: Sequence[str]) -> list[Group]:
    """The groups, sorted by their parameters, numbers by size. A run with an unknown configuration
    forms a group at the end, named after its folder."""
    by_values: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        key = _key([_value(run, name) for name in parameters])
        by_values.setdefault(key if run.config else f"run {index}", []).append(index)
    groups = []
    for members in by_values.values():
        run = runs[members[0]]
        values = settings_of(run, parameters) if run.config else {}
        label = label_of(values) or (str(run.config["name"]) if "name" in run.config else run.name)
        groups.append(Group(label=label, parameters=values, runs=members))

    def rank(group: Group) -> tuple[bool, list[Any]]:
        is_unknown = not runs[group.runs[0]].config
        return is_unknown, [sortable(value) for value in group.parameters.values()]

    return sorted(groups, key=rank)


def repeated(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    """A line for each run that repeats the seed of another run in its group."""
    lines = []
    for group in groups:
        runs_by_seed: dict[str, Run] = {}
        for run in (runs[i] for i in group.runs if runs[i].config):
            seeds = _key([run.config.get(name) for name in SEEDS])
            if seeds in runs_by_seed:
                same = f"the same parameters and seed as {runs_by_seed[seeds].folder}"
                lines.append(f"{run.folder}: {same}; both count")
            runs_by_seed.setdefault(seeds, run)
    return lines


def short_names(parameters: Sequence[str]) -> dict[str, str]:
    """The last word of each dotted key, or as many words as make it unique."""
    names = {}
    for key in parameters:
        words = key.split(".")
        for count in range(1, len(words) + 1):
            name = ".".join(words[-count:])
            if sum(f".{other}".endswith(f".{name}") for other in parameters) == 1:
                break
        names[key] = name
    return names


def label_of(values: Mapping[str, Any]) -> str:
    """The parameters as "kl_coef=0.3, clip_coef=0.2"."""
    names = short_names(list(values))
    return ", ".join(f"{names[key]}={show_value(value)}" for key, value in values.items())


def show_value(value: Any, *, limit: int = 40) -> str:
    """A value of a configuration, short: numbers with four digits, classes by their name."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if text.startswith("rlhf_exp."):
        text = text.rpartition(".")[2]
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def sortable(value: Any) -> tuple[int, float, str]:
    """A key that sorts values of any kind: null, booleans, numbers by size, then texts."""
    if value is None:
        return (0, 0.0, "")
    if isinstance(value, bool):
        return (1, float(value), "")
    if isinstance(value, int | float):
        return (2, float(value), "")
    return (3, 0.0, _key(value))


def _differing_keys(runs: Sequence[Run]) -> list[str]:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if len({_key(run.config.get(key)) for run in runs}) > 1]


def _parameters_within(kind: Sequence[Run]) -> list[str]:
    differing = [key for key in _differing_keys(kind) if use_of(key, kind[0].config).compared]
    chosen = [key.removesuffix(TARGET) for key in differing if key.endswith(TARGET)]
    parameters = [
        key
        for key in differing
        if all(key in run.config for run in kind)
        or not _is_determined(kind, key, [name for name in chosen if key.startswith(f"{name}.")])
    ]
    if len({run.stage for run in kind}) > 1:
        of_stage = [key for key in parameters if key.startswith(f"{STAGE}.")]
        by_preset = {key for key in of_stage if _is_determined(kind, key, [STAGE])}
        parameters = [key for key in parameters if key not in by_preset]
    return [key.removesuffix(TARGET) for key in parameters]


def _is_determined(runs: Sequence[Run], key: str, groups: Sequence[str]) -> bool:
    """Returns True if the options of these groups, except the key itself, determine its value."""
    options = [_key([_value(run, n) for n in groups if f"{n}{TARGET}" != key]) for run in runs]
    pairs = {(option, _key(run.config.get(key))) for option, run in zip(options, runs, strict=True)}
    return len(pairs) == len(set(options))


def _value(run: Run, name: str) -> Any:
    if name == STAGE:
        return run.stage
    return run.config.get(f"{name}{TARGET}", run.config.get(name))


def _partition(runs: Sequence[Run], name: str) -> tuple[int | str, ...]:
    """A number per run, equal for runs that share a value: two keys that change together have the
    same partition. If no two runs share a value, the partition is the key's name."""
    keys = [_key(_value(run, name)) for run in runs]
    return (name,) if len(set(keys)) == len(runs) > 2 else tuple(map(keys.index, keys))


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)

"""The keys of a configuration: the values of keys that are not groups, and the use of every key.

It knows names of keys, not the classes of stages: reading a command line must not import torch.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import pydantic

from rlhf_exp.settings import (
    PARTS,
    ConfigError,
    Count,
    FolderName,
    Index,
    Positive,
    Text,
    field_problem,
    settings,
)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Use:
    """The use of a key. `results`: it affects a job's results, so it is part of the job's identity
    in a sweep. `resume`: whether a resumed run may have another value, or a larger one.
    `compared`: the report may list it as a parameter in which runs differ."""

    results: bool = True
    resume: Literal["fixed", "larger", "free"] = "fixed"
    compared: bool = True


PLACE = Use(results=False, resume="free", compared=False)  # where results go and are shown
LENGTH = Use(resume="larger")
AUTO_GPUS = "auto"  # all that CUDA sees
REPORTING = Use(resume="free", compared=False)  # how often training saves or logs


def _gpu_names(value: Any) -> Any:
    """The setting `gpus` with the names of a list as texts. Raises ConfigError if it is none."""
    if value is None or value == AUTO_GPUS:
        return value
    if not isinstance(value, list | tuple):
        raise ConfigError(f"gpus={value}: write gpus=auto, or a list: 'gpus=[0,1]'")
    names = tuple(map(str, value))
    for number, name in enumerate(names):
        if isinstance(value[number], bool) or not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", name):
            raise ConfigError(
                f"gpus: {name} is no name of a GPU: use those of CUDA_VISIBLE_DEVICES, as 0 or"
                " GPU-8932f937"
            )
        if name in names[:number]:
            raise ConfigError(
                f"gpus: {name} is listed twice; for two jobs on each GPU: jobs_per_gpu=2"
            )
    if not names:
        raise ConfigError("gpus=[]: name one, or write gpus=auto; gpus=null leases none")
    return names


@settings
class SweepSettings:
    """The keys that only a sweep takes; conf/config.yaml says what they mean."""

    skip_completed: Annotated[bool, PLACE]
    fail_fast: Annotated[bool, PLACE]
    gpus: Annotated[str | tuple[str, ...] | None, pydantic.BeforeValidator(_gpu_names), PLACE]
    jobs_per_gpu: Annotated[Count, PLACE]

    def __post_init__(self) -> None:
        if self.jobs_per_gpu > 1 and self.gpus is None:
            raise ConfigError(f"jobs_per_gpu={self.jobs_per_gpu} needs gpus: add gpus=auto")


@settings
class RunSettings(SweepSettings):
    """The keys that are not groups; conf/config.yaml says what they mean."""

    name: Annotated[FolderName, PLACE]
    seed: Annotated[Index, Use(compared=False)]
    prepare_seed: Annotated[Index, Use(compared=False)]
    device: Annotated[Text, Use(results=False, compared=False)]
    artifacts_dir: Annotated[Text, PLACE]
    allow_targets: Annotated[tuple[Text, ...], PLACE]
    prepare: Annotated[dict[str, dict[str, Any]], Use()]
    until: Annotated[Text | None, Use(compared=False)]
    resume: Annotated[Text | None, PLACE]
    resume_with: Annotated[tuple[Text, ...], PLACE]
    max_minutes: Annotated[Positive | None, PLACE]
    dry_run: Annotated[bool, PLACE]


GROUPS = {"stage", *PARTS, "logger", "hub"}
# Keys of a single start: a resumed run does not inherit them.
OF_ONE_START = ("resume", "resume_with", "dry_run")
OF_A_SWEEP = tuple(field.name for field in fields(SweepSettings))  # type: ignore[arg-type]
SEEDS = ("seed", "prepare_seed")
MAX_KL_SUM = "stage.guards.max_kl_sum"  # a run that it ended may continue with another value
# Stages whose eval_every does not affect the weights.
REPORTS_ONLY = ("rlhf_exp.stages.ppo.PPO", "rlhf_exp.stages.dpo.DPO")
BEST_OF_N = "rlhf_exp.stages.best_of_n.BestOfN"  # the phases of its rows are values of n
USES = {
    **{key: hint.__metadata__[-1]
       for key, hint in get_type_hints(RunSettings, include_extras=True).items()},
    "logger": PLACE,
    "hub": PLACE,
    **dict.fromkeys(("stage.checkpoint_every", "stage.histograms_every", "stage.log_every",
                     "stage.snapshots", "stage.snapshot_dtype", "stage.on_phase",
                     "stage.on_phase_every"), REPORTING),
    **dict.fromkeys(("stage.total_phases", "stage.epochs", "stage.max_updates",
                     "stage.max_seconds"), LENGTH),
}  # fmt: skip


def use_of(key: str, config: Mapping[str, Any]) -> Use:
    """The use of a dotted key in a configuration of dotted keys. A step of `prepare` never resumes
    with another value."""
    step = re.match(r"prepare\.[^.]+\.", key)
    place = step[0] if step else ""
    name = key.removeprefix(place)
    if name == "stage.eval_every" and config.get(f"{place}stage._target_") in REPORTS_ONLY:
        return Use(compared=False)
    use = USES.get(name) or (Use() if step else USES.get(key.partition(".")[0], Use()))
    return Use(results=use.results, compared=use.compared) if step else use


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each dotted key of a nested configuration with its value."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_run_settings(config: Mapping[str, Any], *, sweep: bool = False) -> RunSettings:
    """The settings outside groups of a run, or of a job of a sweep. Raises ConfigError with all
    problems and unknown keys, and for a single run that has settings of sweeps."""
    own = _read(RunSettings, {key: config[key] for key in config.keys() - GROUPS})
    for key in ("skip_completed", "fail_fast"):
        if getattr(own, key) and not sweep:
            raise ConfigError(f"{key}=true is for sweeps: add -m")
    if own.gpus is not None and not sweep:
        raise ConfigError("gpus is for sweeps: add -m; a single run takes device=cuda:1")
    return own


def read_sweep_settings(config: Mapping[str, Any]) -> SweepSettings:
    """The settings of a whole sweep. Raises ConfigError with all problems."""
    return _read(SweepSettings, {key: config[key] for key in OF_A_SWEEP})


def _read(kind: type[T], values: Mapping[str, Any]) -> T:
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        problems = sorted(field_problem("", detail) for detail in error.errors())
        raise ConfigError("\n".join(problems)) from error

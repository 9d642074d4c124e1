"""One experiment from a resolved configuration: prepares its artifacts, runs its stage, and writes
the run's result.

It knows nothing of Hydra: the caller passes the function that turns configuration into objects.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rlhf_exp.app.steps import OWN, Instantiate, Prepared, Step, prepare, read_steps
from rlhf_exp.hf import quieten_transformers
from rlhf_exp.machine.network import hub_url
from rlhf_exp.machine.timing import process_age_s
from rlhf_exp.models.known import hub_name
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.runs.context import Context
from rlhf_exp.runs.folder import RunFolder, Sink
from rlhf_exp.runs.paths import MODEL
from rlhf_exp.runs.presentation import attempt
from rlhf_exp.runs.status import write_status
from rlhf_exp.runs.stopping import StopRequests
from rlhf_exp.security.redaction import redact
from rlhf_exp.settings import PARTS, ConfigError, is_reference
from rlhf_exp.stages.dpo import DPO
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.stages.protocol import Built, look_up
from rlhf_exp.tracking.model_card import write_model_card
from rlhf_exp.tracking.protocol import Logger, RunInfo
from rlhf_exp.tracking.push import HubSettings
from rlhf_exp.tracking.several import open_sinks, split_loggers
from rlhf_exp.training.seeding import seed_shared_generators

log = logging.getLogger(__name__)

ROOM = 384  # bytes that names of files in a run's folder add to its path, W&B's and jobs' included


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where and how an experiment runs. The jobs of a sweep share a parent folder; a resumed job
    continues in the folder of the run that ended. `chosen` holds the groups that the command line
    names, `stop` can end the job early, `on_start` is called once everything is loaded, and
    `metrics` holds the names that the result must have."""

    path: Path
    sweep: bool
    resume: bool
    device: torch.device
    seed: int
    prepare_seed: int
    artifacts_dir: Path
    until: str | None
    chosen: frozenset[str]
    stop: StopRequests = field(default_factory=StopRequests)
    on_start: Callable[[], None] = lambda: None
    metrics: Sequence[str] = ()

    @property
    def group(self) -> str | None:
        """The name of the job's sweep, or None for a single run."""
        return self.path.parent.name if self.sweep else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked configuration, resolved: its steps, how many of them are prepared, the groups that
    belong to no step, and the stage and parts of each step."""

    config: Mapping[str, Any]
    steps: Sequence[Step]
    last: int
    loggers: Sequence[Logger]
    hub: HubSettings
    built: Mapping[str, Built]

    def notes(self) -> list[str]:
        """What a dry run says of the run's own stage, if it runs."""
        if self.config["until"] is not None:
            return []
        stage, parts = self.built[self.steps[-1].name]
        return stage.notes(parts, look_up(self.built))


def check_experiment(config: Mapping[str, Any], job: Job, instantiate: Instantiate) -> Plan:
    """The plan of a configuration. Raises ConfigError with everything that is wrong."""
    hub_url()  # raises for a malformed address, with which the hub's client cannot be imported
    longest = os.pathconf("/", "PC_PATH_MAX") - ROOM
    if (length := len(os.fsencode(job.path.absolute()))) > longest:
        raise ConfigError(
            f"{'hydra.sweep.dir' if job.sweep else 'hydra.run.dir'}: its path has {length} bytes,"
            f" more than the {longest} that leave room for the names of files in it: shorten it"
        )
    if job.metrics and job.until is not None:
        raise ConfigError(f"until={job.until}: a search needs results of whole runs: leave it out")
    steps = read_steps(config)
    last = _last_to_prepare(steps, job.until)
    problems: list[str] = []
    built: dict[str, Built] = {}
    for step in steps:
        try:
            built[step.name] = stage, parts = step.build(instantiate)
        except ConfigError as error:
            problems.append(str(error))
    if OWN in built and job.until is None and (toy := _toy_settings(*built[OWN], job.chosen)):
        raise ConfigError(toy)  # alone: other problems may be of the experiment that nobody chose
    if not problems and job.until is None:
        problems += stage.check_upstream(parts, look_up(built))
        problems += _missing_metrics(job.metrics, stage.metric_names(parts))
        problems += [
            f"{part}: {type(stage).__name__} takes none and would ignore it: leave {part}=... out"
            for part in sorted(job.chosen & set(PARTS) - stage.parts)
        ]
    loggers = _build_loggers(config.get("logger") or {}, job, instantiate, problems)
    hub = instantiate(config.get("hub") or {}, "hub", problems)
    if isinstance(hub, HubSettings):
        problems += _push_problems(hub, job)
    elif hub is not None:
        problems.append(_not_for_this("hub", hub))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return Plan(
        config=config, steps=steps, last=last, loggers=loggers, hub=hub, built=built
    )  # fmt: skip


def run_experiment(config: Mapping[str, Any], job: Job, instantiate: Instantiate) -> None:
    """Checks the whole configuration, prepares its artifacts, and runs its stage. Raises
    ConfigError with everything that is wrong, before anything is built."""
    plan = check_experiment(config, job, instantiate)
    quieten_transformers()
    prepared = prepare(
        plan.steps[: plan.last],
        instantiate,
        root=job.artifacts_dir,
        seed=job.prepare_seed,
        device=job.device,
        stop=job.stop,
    )
    if job.until is not None:
        _stop_early(prepared, job.path)
        return
    step = plan.steps[-1].resolved(prepared.folders)
    _run_stage(step, prepared, config, job, plan.loggers, instantiate)
    if (job.path / MODEL).is_dir():
        plan.hub.upload(job.path / MODEL)


def _build_loggers(
    config: Mapping[str, Any], job: Job, instantiate: Instantiate, problems: list[str]
) -> list[Logger]:
    """The chosen logger and those of `logger.also`."""
    loggers: dict[type, Logger] = {}
    for where, settings in split_loggers(config, problems).items():
        logger = instantiate(settings, where, problems)
        if type(logger) in loggers:
            problems.append(f"{where}: {type(logger).__name__} is chosen already; leave it out")
        elif isinstance(logger, Logger):
            problems += logger.problems(name=job.path.name, group=job.group)
            loggers[type(logger)] = logger
        elif logger is not None:
            problems.append(_not_for_this(where, logger))
    return [*loggers.values()]


def _not_for_this(where: str, part: Any) -> str:
    return f"{where}: {type(part).__name__} is not for this; choose another"


def _missing_metrics(metrics: Sequence[str], names: Sequence[str]) -> list[str]:
    return [
        f"hydra.sweeper: {name} is no metric of these runs; they have: {', '.join(sorted(names))}"
        for name in metrics
        if name not in names
    ]


def _push_problems(hub: HubSettings, job: Job) -> list[str]:
    if hub.push and (job.sweep or job.until):
        why = (
            "the jobs of a sweep would overwrite it"
            if job.sweep
            else f"until={job.until} ends before"
        )
        return [f"hub.push=true pushes the model of one run, and {why}: set hub.push=false"]
    return hub.problems()


def _last_to_prepare(steps: Sequence[Step], until: str | None) -> int:
    """The number of steps to prepare. Raises ConfigError if none has the name `until`."""
    names = [step.name for step in steps[:-1]]
    if until is None:
        return len(names)
    if until not in names:
        raise ConfigError(
            f"until={until}: no step of prepare has that name; there are:"
            f" {', '.join(names) or 'none'}"
        )
    return names.index(until) + 1


def _stop_early(prepared: Prepared, path: Path) -> None:
    with RunFolder(path) as folder:
        folder.write_result({"prepare": prepared.results, "seconds": prepared.seconds})
        write_status(folder.path, "done")
    attempt("copying the figures", lambda: prepared.copy_figures(path))
    for name, artifact in prepared.folders.items():
        log.info("%s: %s", name, artifact)
    log.info("run folder: %s", path)


def _run_stage(
    step: Step,
    prepared: Prepared,
    config: Mapping[str, Any],
    job: Job,
    loggers: Sequence[Logger],
    instantiate: Instantiate,
) -> None:
    stage, parts = step.build(instantiate)
    resolved_config = redact({**config, **step.config})
    seed_shared_generators(job.seed)
    info = RunInfo(
        name=job.path.name,
        group=job.group,
        job_type=type(stage).__module__.rpartition(".")[2],
        config=redact(config),
        shared_folder=(job.path.parent if job.sweep else job.path).absolute(),
    )

    @contextmanager
    def begin() -> Iterator[list[Sink]]:
        folder.write_config(resolved_config)
        if not job.resume:
            folder.clear()
        if wandb_id := not (job.sweep or job.resume) and os.environ.get("WANDB_RUN_ID"):
            folder.keep_id(wandb_id)  # an agent's; the jobs of a sweep cannot share it
        job.on_start()
        with open_sinks(loggers, replace(info, run_id=folder.run_id)) as sinks:
            yield sinks

    with RunFolder(job.path, begin) as folder:
        context = Context(
            folder=folder, seed=job.seed, device=job.device, resume=job.resume, stop=job.stop
        )
        with contextlib.chdir("."):  # a reward may change the working folder
            result = stage.run(context, parts)
        seconds = {**prepared.seconds, **result.seconds}
        is_alone = not (job.sweep or job.resume)  # imports and checks then count for this run
        seconds["total"] = process_age_s() if is_alone else sum(seconds.values())
        content = {**replace(result, seconds=seconds).content(), "prepare": prepared.results}
        folder.write_result(content)
        write_status(folder.path, "done")
        show = context.presentation
        show.add("copying the figures of prepared steps", lambda: prepared.copy_figures(job.path))
        if folder.model.is_dir():
            card = functools.partial(
                write_model_card, job.path, resolved_config, content, hub_name=hub_name
            )
            show.add("the model card", card)
        show.add("telling the loggers the result", lambda: folder.log_result(content))
        show.show()
    log.info("seconds: %s", "  ".join(f"{k} {v:.1f}" for k, v in seconds.items()))
    log.info("run folder: %s", job.path)


def _toy_settings(stage: Any, parts: Any, chosen: Collection[str]) -> str | None:
    """A message if PPO or DPO would train a saved model with the settings of a tiny one, since the
    command line chooses no experiment. `chosen` are the groups of the command line; none for a
    configuration that was composed elsewhere."""
    if not chosen or "experiment" in chosen or not isinstance(stage, PPO | DPO):
        return None
    if not isinstance(parts.model, Pretrained) or is_reference(parts.model.base_model):
        return None
    own = "yours" if isinstance(stage, PPO) else "dpo"
    if "~experiment" in chosen:
        fix = f"write experiment={own} in place of ~experiment, with the same overrides"
    else:
        fix = f"add experiment={own}, or experiment=reviews to keep these settings"
    return (
        "model: without an experiment, optimizer.base_lr and other settings are those of a tiny"
        f" model, and would ruin {parts.model.base_model}: {fix}"
    )

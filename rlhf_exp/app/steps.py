"""The steps of an experiment, and how one refers to the artifact of another.

A step is a stage with its parts as plain configuration. It knows nothing of Hydra: the caller
passes the function that turns configuration into objects.
"""

import contextlib
import inspect
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlhf_exp.machine.precision import computes_bf16
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.runs.artifacts import ArtifactStore, content_hash, source_hash
from rlhf_exp.runs.checkpoint import has_checkpoint, remove_checkpoints
from rlhf_exp.runs.context import Context
from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.runs.paths import read_result
from rlhf_exp.runs.presentation import attempt
from rlhf_exp.runs.status import write_status
from rlhf_exp.runs.stopping import StopRequests
from rlhf_exp.runs.summary import describe
from rlhf_exp.security.redaction import redact
from rlhf_exp.settings import FOLDER_NAME, PARTS, REFERENCE, ConfigError, Fingerprinted
from rlhf_exp.stages.protocol import Built, Stage, look_up
from rlhf_exp.training.seeding import seed_shared_generators

log = logging.getLogger(__name__)

OWN = "run"  # the name of the run's own step, which is not in `prepare`
# From a group's configuration and its path to the object, or to None with problems appended.
Instantiate = Callable[[Mapping[str, Any], str, list[str]], Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage and its parts. `path` is their place in the configuration, for messages."""

    name: str
    path: str
    config: Mapping[str, Any]

    def build(self, instantiate: Instantiate) -> Built:
        """The stage and the parts that it takes. Raises ConfigError with all of their problems."""
        problems: list[str] = []
        stage = self._part("stage", instantiate, problems)
        if not isinstance(stage, Stage | None):
            what = type(stage).__name__
            problems.append(f"{self.path}stage: {what} is no stage; choose one: stage=...")
        names = [p for p in PARTS if not isinstance(stage, Stage) or p in stage.parts]
        optional = stage.optional_parts if isinstance(stage, Stage) else ()
        parts = {
            name: self._part(name, instantiate, problems, is_optional=name in optional)
            for name in names
        }
        if not problems:
            misfits = stage.check_kinds(parts) or stage.check(stage.Parts(**parts))
            problems = [f"{self.path}{misfit}" for misfit in misfits]
        if problems:
            raise ConfigError("\n".join(problems))
        return stage, stage.Parts(**parts)

    def _part(
        self,
        part: str,
        instantiate: Instantiate,
        problems: list[str],
        *,
        is_optional: bool = False,
    ) -> Any:
        config = self.config.get(part)
        if not config:
            if not is_optional:
                problems.append(f"{self.path}{part}: is required here; choose one: {part}=...")
            return None
        return instantiate(config, f"{self.path}{part}", problems)

    def resolved(self, folders: Mapping[str, str]) -> "Step":
        """The step with each artifact:NAME replaced by the folder of that name."""
        return replace(self, config=substitute(self.config, folders))

    @property
    def reads_made_task(self) -> bool:
        """True if an earlier step makes the task's data, which may then not exist yet."""
        return any(where.startswith("task.") for where, _ in _references(self.config))


def read_steps(config: Mapping[str, Any]) -> list[Step]:
    """The steps of `prepare` in their order, then the run's own.

    Raises ConfigError for a name that cannot name a folder, for a key that steps do not have, and
    for a reference to an artifact that no earlier step makes.
    """
    for name in config["prepare"]:
        if not re.fullmatch(FOLDER_NAME, name) or name == OWN:
            raise ConfigError(
                f"prepare.{name}: a step's name becomes a folder's: use letters, digits, _, - and"
                f" ., the first neither - nor ., and not {OWN!r}"
            )
    steps = [
        Step(name=name, path=f"prepare.{name}.", config=step)
        for name, step in config["prepare"].items()
    ]
    steps.append(Step(name=OWN, path="", config={k: config.get(k) for k in ("stage", *PARTS)}))
    for i, step in enumerate(steps):
        for key in step.config.keys() - {"stage", *PARTS}:
            raise ConfigError(f"{step.path}{key}: no such key; use: stage, {', '.join(PARTS)}")
        earlier = [s.name for s in steps[:i]]
        for where, name in _references(step.config):
            if name not in earlier:
                raise ConfigError(
                    f"{step.path}{where}={REFERENCE}{name}: no earlier step of prepare has that"
                    f" name; there are: {', '.join(earlier) or 'none'}"
                )
    return steps


def _references(config: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _references(value, f"{where}.{key}".lstrip("."))
    elif isinstance(config, str) and config.startswith(REFERENCE):
        yield where, config.removeprefix(REFERENCE)


def substitute(config: Any, artifacts: Mapping[str, str]) -> Any:
    """The configuration with each artifact:NAME replaced by its value in `artifacts`."""
    if isinstance(config, Mapping):
        return {key: substitute(value, artifacts) for key, value in config.items()}
    if isinstance(config, str) and config.startswith(REFERENCE):
        return artifacts[config.removeprefix(REFERENCE)]
    return config


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Folders, results and seconds of the steps of `prepare`, by name."""

    folders: dict[str, str]
    results: dict[str, Any]
    seconds: dict[str, float]

    def copy_figures(self, path: Path) -> None:
        """Copies the steps' figures to a run's folder as STEP_FIGURE.png."""
        for name, folder in self.folders.items():
            for figure in sorted(Path(folder).glob("*.png")):
                shutil.copyfile(figure, path / f"{name}_{figure.name}")


def prepare(
    steps: Sequence[Step],
    instantiate: Instantiate,
    *,
    root: Path,
    seed: int,
    device: torch.device,
    stop: StopRequests | None = None,
) -> Prepared:
    """Builds the artifact of each step of `prepare` or reuses it.

    The hash that identifies an artifact covers its configuration, the artifacts and files that it
    reads, the seed, and the code of its stage and parts with all their imports. All steps are
    checked before anything is built: raises ConfigError. An interrupted build resumes from its
    newest checkpoint.
    """
    store = ArtifactStore(root)
    built = {step.name: step.build(instantiate) for step in steps}
    descriptions: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for step in steps:
        descriptions[step.name] = _description(step, *built[step.name], keys, seed, device)
        keys[step.name] = content_hash(descriptions[step.name])
    missing = [s for s in steps if not store.folder(s.name, keys[s.name]).is_dir()]
    if missing:
        _check_before_building(missing, built)
    folders: dict[str, str] = {}
    results: dict[str, Any] = {}
    clock = Stopwatch()
    for step in steps:

        def build(path: Path, step: Step = step) -> None:
            resume = has_checkpoint(path)
            if not resume:
                shutil.rmtree(path)
            seed_shared_generators(seed)
            with RunFolder(path) as folder:
                folder.write_made_of(redact(descriptions[step.name]))
                context = Context(
                    folder=folder,
                    seed=seed,
                    device=device,
                    resume=resume,
                    stop=stop or StopRequests(),
                )
                _run(step.resolved(folders), instantiate, context)

        with clock(f"prepare.{step.name}"):
            folder = store.obtain(step.name, keys[step.name], build)
        folders[step.name] = str(folder)
        results[step.name] = read_result(folder)["after"]
        if step not in missing:  # a stage that just ran has logged it
            log.info("%s: %s", step.name, describe(results[step.name]))
    return Prepared(folders=folders, results=results, seconds=clock.seconds)


def _run(step: Step, instantiate: Instantiate, context: Context) -> None:
    """Runs a step's stage and writes its result; figures and cleanup come after that."""
    stage, parts = step.build(instantiate)
    folder = context.folder
    with contextlib.chdir("."):  # a reward may change the working folder
        result = stage.run(context, parts)
    folder.write_result(result.content())
    write_status(folder.path, "done")
    context.presentation.show()
    # A finished step is never resumed.
    attempt("removing the checkpoints", lambda: remove_checkpoints(folder.path))


def _description(
    step: Step,
    stage: Stage[Any],
    parts: Any,
    keys: Mapping[str, str],
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    return {
        "parts": substitute(_read_by(step, parts), keys),
        "data": {
            name: part.fingerprint()
            for name, part in vars(parts).items()
            if isinstance(part, Fingerprinted)
        },
        "seed": seed,
        # With dtype=auto the machine decides.
        "bf16": "auto" in _dtypes(step.config["stage"]) and computes_bf16(device),
        "code": source_hash(*(Path(inspect.getfile(kind)) for kind in classes_of([stage, parts]))),
    }


def _read_by(step: Step, parts: Any) -> dict[str, Any]:
    """The configuration of the stage and of the parts that it has."""
    names = ("stage", *(name for name, part in vars(parts).items() if part is not None))
    return {name: step.config[name] for name in names}


def _dtypes(stage: Mapping[str, Any]) -> tuple[Any, Any]:
    return stage.get("dtype"), stage.get("compute", {}).get("dtype")


def classes_of(value: Any) -> set[type]:
    """The class of the settings, and of all settings in their fields, lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return set().union(*map(classes_of, value))
    if not is_dataclass(value):
        return set()
    return {type(value)} | classes_of([getattr(value, f.name) for f in fields(value)])


def _check_before_building(missing: Sequence[Step], built: Mapping[str, Built]) -> None:
    problems = []
    for step in missing:
        stage, parts = built[step.name]
        of_texts = [] if step.reads_made_task else stage.check_texts(parts)
        of_upstream = stage.check_upstream(parts, look_up(built))
        problems += [f"{step.path}{problem}" for problem in of_texts + of_upstream]
    if problems:
        raise ConfigError("\n".join(problems))

"""The protocol of a stage: its parts, its checks before anything runs, its run, its result.

It knows no particular stage: each one describes its own artifact.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar, cast, get_args

from rlhf_exp.models.interventions import Intervention
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.runs.context import Context
from rlhf_exp.settings import REFERENCE, Artifact, ChecksUpstream, Upstream, is_reference

P = TypeVar("P")


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The final metrics of a stage, those from before training if it measures them, the seconds of
    its sections, and the further keys of result.json."""

    after: Mapping[str, float | None]
    before: Mapping[str, float | None] | None = None
    seconds: Mapping[str, float]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """The content of result.json."""
        before = {} if self.before is None else {"before": self.before}
        return {**before, "after": self.after, **self.extra, "seconds": self.seconds}


class Stage(ABC, Generic[P]):
    """The settings of a stage. `Parts` is the dataclass of the parts that it takes, each field
    named after its group in the configuration; `parts` are their names. A part whose default is
    None may be absent; these are the `optional_parts`."""

    Parts: ClassVar[type[Any]]
    parts: ClassVar[frozenset[str]]
    optional_parts: ClassVar[frozenset[str]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        parts = fields(cls.Parts)
        cls.parts = frozenset(part.name for part in parts)
        cls.optional_parts = frozenset(part.name for part in parts if part.default is None)

    def check_kinds(self, parts: Mapping[str, Any]) -> list[str]:
        """A message for each part that is of the wrong class: "needs" in the metadata of its field
        if it has one, else one that names both classes."""
        problems = []
        for declared in fields(self.Parts):
            name, kind, part = declared.name, cast(type, declared.type), parts[declared.name]
            if not isinstance(part, kind):
                what = f"{type(part).__name__} is not for this stage, {type(self).__name__}"
                first, *_ = get_args(kind) or (kind,)  # of Reward | None
                fix = f"which takes a {first.__name__}; choose another {name}=..."
                problems.append(declared.metadata.get("needs", f"{name}: {what}, {fix}"))
        return problems

    def check(self, parts: P) -> list[str]:
        """Conflicts between the stage and its parts. Raises ConfigError for a part whose files
        are missing or malformed."""
        return []

    def check_texts(self, parts: P) -> list[str]:
        """Conflicts between the stage and its task's texts, which take a second to read."""
        return []

    def check_upstream(self, parts: P, upstream: Upstream) -> list[str]:
        """Conflicts between the parts and the artifacts that earlier steps will make. Each part
        checks itself, completions must leave room for a prompt in the model's context, and an
        intervention's sites must be in the model."""
        by_name = vars(parts)
        checking = [part for part in by_name.values() if isinstance(part, ChecksUpstream)]
        problems = [problem for part in checking for problem in part.check_upstream(upstream)]
        model, sampler, intervention = map(by_name.get, ("model", "sampler", "intervention"))
        if (made := upstream_artifact(model, upstream)) is not None:
            length, key, model = made.context_len, made.context_len_key, made.model
            if isinstance(sampler, Sampler) and length is not None and sampler.gen_len >= length:
                problems.append(
                    f"sampler.gen_len={sampler.gen_len} leaves no room for a prompt in"
                    f" {key}={length}: lower the first or raise the second"
                )
        if isinstance(intervention, Intervention) and model is not None:
            problems += intervention.check(model)
        return problems

    def notes(self, parts: P, upstream: Upstream) -> list[str]:
        """What a dry run says of the stage, besides what it checks."""
        return []

    def artifact(self, parts: P, upstream: Upstream, *, path: str) -> Artifact:
        """The properties of the stage's artifact before it is made, by default its model's context
        length. `path` is the parts' place in the configuration."""
        model = vars(parts).get("model")
        if isinstance(model, Scratch):
            key = f"{path}model.context_len"
            return Artifact(context_len=model.context_len, context_len_key=key, model=model)
        return upstream_artifact(model, upstream) or Artifact()

    @abstractmethod
    def metric_names(self, parts: P) -> tuple[str, ...]:
        """The names of the metrics in the result."""

    @abstractmethod
    def run(self, context: Context, parts: P) -> StageResult:
        """Does the work, writes it to the context's folder, and returns the result."""


Built = tuple[Stage[Any], Any]  # a stage and its parts


def look_up(built: Mapping[str, Built]) -> Upstream:
    """A function that returns an artifact's properties, from the stages of the steps."""

    def upstream(reference: str) -> Artifact | None:
        if not is_reference(reference):
            return None
        name = reference.removeprefix(REFERENCE)
        stage, parts = built[name]
        return stage.artifact(parts, upstream, path=f"prepare.{name}.")

    return upstream


def upstream_artifact(model: Any, upstream: Upstream) -> Artifact | None:
    """The artifact that the model will be loaded from, if an earlier step makes it."""
    return upstream(model.base_model) if isinstance(model, Pretrained) else None

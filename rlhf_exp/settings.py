"""What every group of the configuration is made of: frozen, range-checked dataclasses.

It knows pydantic and nothing of Hydra: the classes are as usable from Python as from a YAML file.
"""

from collections.abc import Callable
from typing import Annotated, Any, Protocol, TypeVar, dataclass_transform, runtime_checkable

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from rlhf_exp.security.redaction import redact_words

T = TypeVar("T")


# A value artifact:NAME stands for what the step NAME of `prepare` will make.
REFERENCE = "artifact:"

# The groups that a stage is handed, of which its `Parts` names those that it takes.
PARTS = (
    "task", "model", "finetune", "reward", "sampler", "optimizer", "schedule", "intervention",
)  # fmt: skip


class ConfigError(ValueError):
    """The user's mistake in a configuration or a file: the message names the field and the fix."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A part that reads files, which its configuration only names."""

    def fingerprint(self) -> str:
        """A hash of the files, "" for none."""
        ...


def is_reference(text: str) -> bool:
    """Whether a value stands for what an earlier step makes, which may not be there yet."""
    return text.startswith(REFERENCE)


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not a boolean")
    return value


_number = BeforeValidator(_refuse_bool)

Positive = Annotated[float, _number, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, _number, Field(ge=0, allow_inf_nan=False)]
Real = Annotated[float, _number, Field(allow_inf_nan=False)]
Fraction = Annotated[float, _number, Field(ge=0, le=1, allow_inf_nan=False)]
OpenFraction = Annotated[float, _number, Field(gt=0, lt=1, allow_inf_nan=False)]
BelowOne = Annotated[float, _number, Field(ge=0, lt=1, allow_inf_nan=False)]
# Below a thousandth the logits overflow; greedy decoding is top_k=1.
Temperature = Annotated[float, _number, Field(ge=1e-3, allow_inf_nan=False)]
TopP = Annotated[float, _number, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, _number, Field(ge=1)]
Index = Annotated[int, _number, Field(ge=0)]
FOLDER_NAME = r"^\w[\w.-]*$"
FolderName = Annotated[str, Field(pattern=FOLDER_NAME)]
Text = Annotated[str, Field(min_length=1)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """The class as a frozen keyword-only dataclass that checks types and ranges when it is built.

    Raises pydantic.ValidationError with every bad field of the class at once, unknown ones
    included.
    """
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return dataclass(frozen=True, kw_only=True, config=config)(cls)  # type: ignore[return-value]


@settings
class Artifact:
    """What is known of a step's artifact before it is made: the labels of a classifier; of a
    language model its settings, its context in tokens and the key that sets that."""

    labels: tuple[str, ...] | None = None
    context_len: int | None = None
    context_len_key: str = ""
    model: Any = None


# Returns what is known of the artifact that a value artifact:NAME stands for, else None.
Upstream = Callable[[str], Artifact | None]


@runtime_checkable
class ChecksUpstream(Protocol):
    """A part that can tell whether an artifact will do before it is made."""

    def check_upstream(self, upstream: Upstream) -> list[str]:
        """What is wrong between the part and the artifacts that it refers to."""
        ...


def field_problem(path: str, detail: Any) -> str:
    """One of pydantic's complaints as a line that names the field below `path`, without secrets."""
    where = ".".join(filter(None, (path, *map(str, detail["loc"]))))
    if detail["type"] == "missing":
        return f"{where}: is required"
    if detail["type"] == "unexpected_keyword_argument":
        return f"{where}: no such key" + (f" of {path}" if path else "")
    if isinstance(detail.get("ctx", {}).get("error"), ConfigError):
        return str(detail["ctx"]["error"])  # which names its field itself
    if detail["type"] == "dataclass_type" and isinstance(detail["input"], str):
        return f"{where} is a group: write {where.replace('.', '/')}={detail['input']}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "tuple_type":
        message = "Input should be a list, as [a,b]"
    if not detail["loc"]:
        return f"{path}: {message}"
    [shown] = redact_words([f"{where}={detail['input']!r}"])
    return f"{shown}: {message}"

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

# The groups that a stage may use; its `Parts` names those that it does.
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
    """Returns True if a value refers to an artifact of an earlier step, which may not exist yet."""
    return text.startswith(REFERENCE)


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not a boolean")
    return value


_number = BeforeValidator(_refuse_bool)

Positive = Annotated[float, _number, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, _number, Field(ge=0, allow_inf_nan=False)]
Real = Annotated[float, _number, Field(allow_inf_nan=False)]
Fraction = Annotated[float, _number, Field(ge=0, le=1, allow_inf_nan=False)]
OpenFraction = Annotated[float, _number, Field(gt=0, lt=1, allow_inf_nan=False)]
AboveOne = Annotated[float, _number, Field(gt=1, allow_inf_nan=False)]
BelowOne = Annotated[float, _number, Field(ge=0, lt=1, allow_inf_nan=False)]
BelowHalf = Annotated[float, _number, Field(ge=0, lt=0.5, allow_inf_nan=False)]
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

    Raises pydantic.ValidationError that lists every invalid or unknown field at once.
    """
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return dataclass(frozen=True, kw_only=True, config=config)(cls)  # type: ignore[return-value]


@settings
class Artifact:
    """Description of an artifact before its step has run: the labels of a classifier, or the
    settings of a language model, its context in tokens and the key that sets the context."""

    labels: tuple[str, ...] | None = None
    context_len: int | None = None
    context_len_key: str = ""
    model: Any = None


# Returns the description of the artifact that a value artifact:NAME refers to, or None.
Upstream = Callable[[str], Artifact | None]


@runtime_checkable
class ChecksUpstream(Protocol):
    """A part that can check an artifact before the artifact exists."""

    def check_upstream(self, upstream: Upstream) -> list[str]:
        """Messages, one for each artifact that the part refers to but cannot use."""
        ...


# What pydantic expects, by the type of its error.
EXPECTED = {
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    "finite_number": "a finite number",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "tuple_type": "a list, as [a,b]",
    "literal_error": "{expected}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
}


def field_problem(path: str, detail: Any) -> str:
    """One error of pydantic as a line that names the field under `path`, secrets redacted."""
    where = ".".join(filter(None, (path, *map(str, detail["loc"]))))
    if detail["type"] == "missing":
        return f"{where}: is required"
    if detail["type"] == "unexpected_keyword_argument":
        return (
            f"{where}: no such key of {path}; leave it out: '~{where}'"
            if path
            else f"{where}: no such key"
        )
    if isinstance(detail.get("ctx", {}).get("error"), ConfigError):
        return str(detail["ctx"]["error"])  # the message names the field already
    if detail["type"] == "dataclass_type" and isinstance(detail["input"], str):
        return f"{where} is a group: write {where.replace('.', '/')}={detail['input']}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in EXPECTED:
        message = f"should be {EXPECTED[detail['type']].format(**detail.get('ctx', {}))}"
    if not detail["loc"]:
        return f"{path}: {message}"
    [assignment] = redact_words([f"{where}={detail['input']!r}"])
    return f"{assignment}: {message}"

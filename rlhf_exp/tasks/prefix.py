"""Prompts given as one or several prefixes, for models and rewards from elsewhere.

Knows no corpus, no labels and no tokenizer.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from rlhf_exp.settings import ConfigError, Fraction, Text, settings
from rlhf_exp.tasks.hashing import hash_fraction
from rlhf_exp.tasks.text_files import read_text


def _texts(value: Any) -> Any:
    """The value. Raises one ValueError instead of pydantic's errors for each possible type."""
    texts = value if isinstance(value, list) else [value]
    if value is not None and not (texts and all(isinstance(t, str) and t for t in texts)):
        raise ValueError("give a text or a list of texts, none of them empty")
    return value


@settings
class Prefix:
    """A prefix, a list of prefixes, or a file with one a line; repeated ones count once.

    A `held_out_fraction` of several prefixes (rounded: none of fewer than five by default) is held
    out; if none is, evaluations use the training prefixes.
    """

    prefix: Annotated[str | list[str] | None, BeforeValidator(_texts)] = "This is"
    """Text that PPO's completions continue, 1 to 20 words; or a list of them; null with
    prefix_file."""
    prefix_file: Text | None = None
    """UTF-8 file with a prefix a line, instead of prefix."""
    held_out_fraction: Fraction = 0.1
    """Fraction of several prefixes that only evaluations use; 0 to 0.5."""
    prepend_bos: bool | None = None
    """Whether a prompt begins with BOS; null: if the tokenizer adds one by itself."""

    @model_validator(mode="after")
    def _one_source(self) -> "Prefix":
        if (self.prefix is None) == (self.prefix_file is None):
            raise ValueError(
                f"prefix={self.prefix!r} and prefix_file={self.prefix_file!r}: set exactly one, the"
                " other null"
            )
        return self

    def fingerprint(self) -> str:
        """The SHA-256 of the file, "" without one. Raises ConfigError if it cannot be read or
        holds no prefix, and if the held-out fraction leaves none to train on."""
        if not self._parts[0]:
            raise ConfigError(
                f"task.held_out_fraction={self.held_out_fraction} leaves no prefix to train on:"
                " lower it"
            )
        if self.prefix_file is None:
            return ""
        return hashlib.sha256("\n".join(self._prefixes).encode()).hexdigest()

    def train_prompts(self) -> tuple[str, ...]:
        """The prefixes that are not held out."""
        return self._parts[0]

    def eval_prompts(self) -> tuple[str, ...]:
        """The held-out prefixes, or all if none is held out."""
        return self._parts[1] or self._parts[0]

    @cached_property
    def _parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        prefixes = self._prefixes
        # Rounds halves up; round() would give 0 for 0.5.
        share = int(self.held_out_fraction * len(prefixes) + 0.5)
        count = share if len(prefixes) > 1 else 0
        held_out = set(sorted(prefixes, key=hash_fraction)[:count])
        return (
            tuple(p for p in prefixes if p not in held_out),
            tuple(p for p in prefixes if p in held_out),
        )

    @cached_property
    def _prefixes(self) -> list[str]:
        if self.prefix_file is not None:
            file = Path(self.prefix_file).expanduser()
            lines = read_text(file, field="task.prefix_file").split("\n")
            prefixes = [line.removesuffix("\r") for line in lines if line.strip()]
            if not prefixes:
                raise ConfigError(f"task.prefix_file: {file} holds no prefix: give one a line")
        else:
            prefixes = [self.prefix] if isinstance(self.prefix, str) else list(self.prefix or ())
        return list(dict.fromkeys(prefixes))

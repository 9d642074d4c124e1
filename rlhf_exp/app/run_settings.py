"""The keys of a configuration that are not groups; conf/config.yaml says what they mean."""

from collections.abc import Mapping
from typing import Any

import pydantic

from rlhf_exp.settings import (
    PARTS,
    ConfigError,
    FolderName,
    Index,
    Positive,
    Text,
    field_problem,
    settings,
)

GROUPS = {"stage", *PARTS, "logger", "hub"}


@settings
class RunSettings:
    """The keys' values."""

    name: FolderName
    seed: Index
    prepare_seed: Index
    device: Text
    artifacts_dir: Text
    allow_targets: tuple[Text, ...]
    prepare: dict[str, dict[str, Any]]
    until: Text | None
    resume: Text | None
    resume_with: tuple[Text, ...]
    max_minutes: Positive | None
    skip_completed: bool
    dry_run: bool


def read_run_settings(config: Mapping[str, Any]) -> RunSettings:
    """The configuration's keys that are not groups. Raises ConfigError with everything that is
    wrong with them, keys that there are not included."""
    try:
        return RunSettings(**{key: config[key] for key in config.keys() - GROUPS})
    except pydantic.ValidationError as error:
        problems = sorted(field_problem("", detail) for detail in error.errors())
        raise ConfigError("\n".join(problems)) from error

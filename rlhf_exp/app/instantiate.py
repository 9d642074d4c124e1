"""Builds the object that a group's configuration describes, if its target is allowed.

It knows how Hydra builds objects; allowed_targets.py knows which targets are allowed.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
import pydantic
from hydra.errors import InstantiationException
from hydra.utils import get_object

from rlhf_exp.app.allowed_targets import find_targets, forbidden_module, instructions, unusable
from rlhf_exp.app.overrides import without_interpolations
from rlhf_exp.app.user_modules import import_problem
from rlhf_exp.settings import ConfigError, field_problem

ALLOWED_TARGETS = ("rlhf_exp.", "torch.optim.")


def instantiate(
    config: Mapping[str, Any], path: str, problems: list[str], *, allowed: Sequence[str]
) -> Any:
    """The object that a group's configuration describes, or None with its problems appended. If
    importing a user's module changes the working folder, the change is undone."""
    with contextlib.chdir("."):
        return _instantiate(config, path, problems, allowed)


def _instantiate(
    config: Mapping[str, Any], path: str, problems: list[str], allowed: Sequence[str]
) -> Any:
    if "_target_" not in config:
        problems.append(f"{path}: no option is chosen; choose one: {path.rpartition('.')[2]}=...")
        return None
    for key, target in find_targets(config, path):
        module = forbidden_module(target, tuple(allowed), ALLOWED_TARGETS, find=get_object)
        if module is not None:
            problems.append(
                f"{key}._target_={target} is outside of {', '.join(allowed)}; if you trust that"
                f" module, add it: allow_targets=[{module}]"
            )
            return None
        if unusable(target, ALLOWED_TARGETS, find=get_object):
            problems.append(f"{key}._target_={target}: it is no class of settings; see conf/")
            return None
    if keys := instructions(config, ("rlhf_exp.",)):
        problems += [f"{path}: {name} is no key of it; leave it out" for name in keys]
        return None
    return _build(_literal(config), path, problems)


def _build(config: Mapping[str, Any], path: str, problems: list[str]) -> Any:
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        # Hydra's message ends with the innermost part that it was building.
        inner = re.search(r"^full_key: (.+)$", str(error), re.MULTILINE)
        if inner:
            first = inner[1].partition(".")[0]
            rest: list[str] = []
            _build({key: value for key, value in config.items() if key != first}, path, rest)
            problems += [problem for problem in rest if not problem.startswith(f"{path}.{first}")]
            path = f"{path}.{inner[1]}"
        if isinstance(cause, pydantic.ValidationError):
            problems += [field_problem(path, detail) for detail in cause.errors()]
        elif isinstance(cause, ConfigError):
            problems.append(f"{path}: {cause}")
        elif target := re.match(r"Error locating target '(.*?)', set env var", str(error)):
            problems.append(f"{path}._target_={target[1]}: {import_problem(target[1], cause)}")
        else:
            reason = f" {cause}" if cause else ""
            problems.append(f"{path}: {str(error).splitlines()[0]}{reason}")
        return None


def _literal(config: Any) -> Any:
    """A resolved configuration with its texts escaped, since Hydra resolves them twice more."""
    if isinstance(config, Mapping):
        return {key: _literal(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [*map(_literal, config)]
    if isinstance(config, str):
        return without_interpolations(without_interpolations(config))
    return config

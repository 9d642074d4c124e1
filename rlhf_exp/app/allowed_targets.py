"""The check of the classes and functions that a configuration names."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic.dataclasses import is_pydantic_dataclass


def forbidden_module(
    target: str, allowed: tuple[str, ...], ours: tuple[str, ...], *, find: Callable[[str], Any]
) -> str | None:
    """The module of a target, or None if the target is allowed. A name that starts with an allowed
    module may still lead to a module that it imports: rlhf_exp.app.run.shutil.rmtree."""
    if not target.startswith(allowed):
        return target.rpartition(".")[0] or target
    if not target.startswith(ours):
        return None  # the user trusts it
    try:
        module = inspect.getmodule(find(target))
    except (ImportError, ValueError):
        return None  # the name does not exist; instantiating it raises the error
    if module is None or f"{module.__name__}.".startswith(allowed):
        return None
    return module.__name__


def unusable(target: str, ours: tuple[str, ...], *, find: Callable[[str], Any]) -> bool:
    """Returns True if one of our own targets is not a class of settings. Building settings has no
    side effects; a function or a method, such as one of a module's dictionary, may do anything."""
    if not target.startswith(ours):
        return False
    try:
        class_or_function = find(target)
    except (ImportError, ValueError):
        return False
    is_ours = target.startswith("rlhf_exp.")
    return not isinstance(class_or_function, type) or (
        is_ours and not is_pydantic_dataclass(class_or_function)
    )


def instructions(config: Any, ours: tuple[str, ...]) -> list[str]:
    """Hydra's keys other than `_target_` in the configuration of our own classes, which take
    neither positional arguments nor parts that are not built."""
    keys = ("_args_", "_convert_", "_partial_", "_recursive_")
    parts = [part for _, part in _mappings(config, "")]
    own = [part for part in parts if str(part.get("_target_", "")).startswith(ours)]
    return [key for part in own for key in keys if key in part]


def find_targets(config: Any, path: str) -> list[tuple[str, str]]:
    """Every `_target_` in the configuration at a path, at any depth, as (key, target)."""
    parts = _mappings(config, path)
    return [(key, str(part["_target_"])) for key, part in parts if "_target_" in part]


def _mappings(config: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping in the configuration at a path, with its own path."""
    if isinstance(config, Mapping):
        yield path, config
    children = dict(enumerate(config)) if isinstance(config, list) else config
    if isinstance(children, Mapping):
        for key, value in children.items():
            yield from _mappings(value, f"{path}.{key}")

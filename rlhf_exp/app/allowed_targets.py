"""Which classes and functions a configuration may name."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic.dataclasses import is_pydantic_dataclass


def forbidden_module(
    target: str, allowed: tuple[str, ...], own: tuple[str, ...], *, find: Callable[[str], Any]
) -> str | None:
    """The module that a target belongs to if it is not an allowed one. Names of an allowed module
    may lead out of it again, to what it imports: rlhf_exp.app.run.shutil.rmtree."""
    if not target.startswith(allowed):
        return target.rpartition(".")[0] or target
    if not target.startswith(own):
        return None  # the user trusts it
    try:
        module = inspect.getmodule(find(target))
    except (ImportError, ValueError):
        return None  # there is none of that name, as who instantiates it will say
    if module is None or f"{module.__name__}.".startswith(allowed):
        return None
    return module.__name__


def unusable(target: str, own: tuple[str, ...], *, find: Callable[[str], Any]) -> bool:
    """Whether one of our own targets is something else than configurations describe. Those of this
    package are classes of settings, which do nothing when they are built; a function or a method,
    that of a module's dictionary included, may do anything."""
    if not target.startswith(own):
        return False
    try:
        found = find(target)
    except (ImportError, ValueError):
        return False
    is_ours = target.startswith("rlhf_exp.")
    return not isinstance(found, type) or (is_ours and not is_pydantic_dataclass(found))


def instructions(config: Any, own: tuple[str, ...]) -> Iterator[str]:
    """The keys by which a configuration tells Hydra how to build one of our own classes, other than
    which it is: they do not take positional arguments, nor parts that are not built."""
    if isinstance(config, Mapping):
        if str(config.get("_target_", "")).startswith(own):
            yield from (
                key for key in ("_args_", "_convert_", "_partial_", "_recursive_") if key in config
            )
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from instructions(value, own)


def targets(config: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every `_target_` in the configuration at a path, however deep, after the path that it is
    at."""
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield path, str(config["_target_"])
        for key, value in config.items():
            yield from targets(value, f"{path}.{key}")
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from targets(value, f"{path}.{number}")

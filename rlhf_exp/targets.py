"""Which classes and functions a configuration may name."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def forbidden_module(
    target: str, allowed: tuple[str, ...], own: tuple[str, ...], *, find: Callable[[str], Any]
) -> str | None:
    """The module that a target belongs to if it is not an allowed one. Names of an allowed module
    may lead out of it again, to what it imports: rlhf_exp.run.shutil.rmtree."""
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


def targets(config: Any) -> Iterator[str]:
    """Every `_target_` in a configuration, however deep."""
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield str(config["_target_"])
        for value in config.values():
            yield from targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from targets(value)

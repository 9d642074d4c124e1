"""A reward that calls the user's Python function as TRL calls reward functions.

Knows how to find and call the function, not what it computes. By hand, since TRL calls such
functions only within its trainers, and importlib says too little of what is wrong with a file.
"""

import asyncio
import difflib
import functools
import hashlib
import importlib
import inspect
import os
import reprlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from inspect import Parameter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rlhf_exp.rewards.faults import describe_fault
from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rewards.samples import Samples, read_scores, to_samples
from rlhf_exp.settings import ConfigError, Text, settings
from rlhf_exp.types import Completions

STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")
BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@settings
class FunctionReward:
    """The scores of `function`, a "module:callable" or "path/to/file.py:callable".

    It is called as f(prompts=..., completions=..., completion_ids=..., **columns), each a list with
    one entry a sample, or with the arguments that its signature names. A conversation comes as a
    list of messages, its completion as a list with one message of the assistant. Coroutines are
    awaited, all on one event loop.
    """

    function: Text
    """module:callable or path/to/file.py:callable."""

    def fingerprint(self) -> str:
        """The SHA-256 of the module's file and of the file that defines the callable, if that is
        another; "" if neither is Python source. Raises ConfigError as `load` does."""
        function, module = find_function(self.function)
        files = dict.fromkeys((module.__dict__.get("__file__"), source_file(function)))
        sources = [Path(file).read_bytes() for file in files if file and file.endswith(".py")]
        return hashlib.sha256(b"".join(sources)).hexdigest() if sources else ""

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function. Raises ConfigError if there is no such callable, if its import fails
        or if it does not accept completions."""
        who = f"reward.function={self.function}"
        function, _ = find_function(self.function)
        parameters = inspect.signature(function).parameters
        # One loop for all calls: the clients in a user's module stay bound to their first loop.
        runners = [asyncio.Runner()]

        def call(kwargs: Mapping[str, list[Any]]) -> Any:
            result = function(**kwargs)
            if not inspect.isawaitable(result):
                return result
            if runners[-1].get_loop().is_running():  # by a hanging call on another thread
                runners.append(asyncio.Runner())
            return runners[-1].run(_wait_for(result))

        def score(completions: Completions) -> torch.Tensor:
            samples = to_samples(completions)
            kwargs = arguments(parameters, samples, who=who)
            try:
                values = call(kwargs)
            except FAULTS as error:
                # Fresh lists, since the call may have changed the others before it failed.
                kwargs = arguments(parameters, to_samples(completions), who=who)
                fault = describe_fault(error, caller=__file__, file=source_file(function))
                raise RewardError(
                    f"{who} raised {fault}\n{_culprit(call, kwargs, samples)}"
                ) from error
            scores = read_scores(values, samples, who=who)
            return torch.tensor(scores, dtype=torch.float32, device=device)

        weakref.finalize(score, _close, runners)
        return score


# What a user's function may raise; sys.exit() and a cancelled task do not raise an Exception.
FAULTS = (Exception, SystemExit, asyncio.CancelledError)


def _close(runners: Sequence[asyncio.Runner]) -> None:
    for runner in runners:
        if not runner.get_loop().is_running():
            runner.close()


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable


def arguments(
    parameters: Mapping[str, Parameter], samples: Samples, *, who: str
) -> dict[str, list[Any]]:
    """The arguments by name: all of them for a function with **kwargs, else those that it names.
    Raises RewardError if the samples lack a column that it needs, and for a column that is named
    like a standard argument."""
    clash = sorted(samples.columns.keys() & set(STANDARD_ARGUMENTS))
    if clash:
        raise RewardError(
            f"{who}: the dataset has a column {clash[0]!r}, the name of a standard argument of"
            f" reward functions; rename the column\n{samples.show(0)}"
        )
    available = {
        "prompts": samples.prompts,
        "completions": samples.completions,
        "completion_ids": samples.completion_ids,
        **samples.columns,
    }
    named = [p for p in parameters.values() if p.kind in BY_NAME]
    absent = [p.name for p in named if p.default is Parameter.empty and p.name not in available]
    if absent:
        raise RewardError(
            f"{who} needs {', '.join(absent)}, but the samples have no column of that name; there"
            f" are {', '.join(available)}\n{samples.show(0)}"
        )
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return available
    return {p.name: available[p.name] for p in named if p.name in available}


def _culprit(
    call: Callable[[Mapping[str, list[Any]]], Any],
    kwargs: Mapping[str, list[Any]],
    samples: Samples,
) -> str:
    """A message naming the first sample of a failed batch for which a call by itself fails too."""
    for index in range(len(samples)):
        try:
            call({name: entries[index : index + 1] for name, entries in kwargs.items()})
        except FAULTS:
            return f"it also fails for one sample by itself, {samples.show(index)}"
    return (
        f"it fails for none of the {len(samples)} samples by itself; the first is {samples.show(0)}"
    )


def find_function(name: str) -> tuple[Callable[..., Any], ModuleType]:
    """As `import_function`. Raises ConfigError also if the callable does not accept completions."""
    who = f"reward.function={name}"
    function, module = import_function(name, who=who)
    _check_signature(function, who)
    return function, module


def import_function(name: str, *, who: str) -> tuple[Callable[..., Any], ModuleType]:
    """The callable "module:callable" or "path/to/file.py:callable", and the module. Raises
    ConfigError, which begins with `who`, if it cannot be imported."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConfigError(f"{who}: give module:callable or path/to/file.py:callable")
    if place.endswith(".py") or os.sep in place:
        module = _import_file(Path(place).expanduser(), who)
    else:
        module = _import_module(place, who)
    try:
        function = getattr(module, attribute)
    except AttributeError as error:
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        close = difflib.get_close_matches(attribute, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {_listed(names)}"
        file = module.__dict__.get("__file__") or place
        raise ConfigError(f"{who}: there is no {attribute} in {file}; {hint}") from error
    if not callable(function):
        raise ConfigError(
            f"{who}: {attribute} is not a function but {type(function).__name__}"
            f" {reprlib.repr(function)}; name a callable"
        )
    return function, module


def signature_of(function: Callable[..., Any], *, who: str) -> inspect.Signature:
    """The function's signature. Raises ConfigError, which begins with `who`, if it has none."""
    try:
        return inspect.signature(function)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{who}: its signature cannot be read; wrap it in a def") from error


def _check_signature(function: Callable[..., Any], who: str) -> None:
    signature = signature_of(function, who=who)
    if not any(
        p.kind is Parameter.VAR_KEYWORD or (p.name == "completions" and p.kind in BY_NAME)
        for p in signature.parameters.values()
    ):
        raise ConfigError(
            f"{who}: it takes {signature}, but must take the keyword completions, or **kwargs: def"
            " f(prompts, completions, **kwargs)"
        )


def _import_module(name: str, who: str) -> ModuleType:
    _make_importable(Path.cwd())
    with _import_errors(who, f"importing {name}", module=name):
        return importlib.import_module(name)


def _import_file(path: Path, who: str) -> ModuleType:
    """The file as a module; it runs again only if it has changed."""
    file = path.resolve()
    try:
        source = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{who}: cannot read {file}: {error.strerror}") from error
    digest = hashlib.sha256(str(file).encode() + b"\0" + source).hexdigest()
    spec = spec_from_file_location(f"{file.stem}_{digest[:12]}", file)
    if spec is None:
        raise ConfigError(f"{who}: {file} is not a Python file; its name must end in .py")
    if spec.name in sys.modules:
        return sys.modules[spec.name]
    _make_importable(file.parent)
    module = module_from_spec(spec)
    # Dataclasses and pickles look up the module that they are defined in.
    sys.modules[spec.name] = module
    try:
        with _import_errors(who, f"running {file}"):
            # Not by the loader, whose cache misses a change within the same second that keeps the
            # file's size.
            exec(compile(source, str(file), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _make_importable(folder: Path) -> None:
    """Appends the folder to the import path; at the end, no file in it hides a library."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@contextmanager
def _import_errors(who: str, action: str, *, module: str = "") -> Iterator[None]:
    """Turns an exception of the user's module, or a missing `module`, into ConfigError. Restores
    the working directory."""
    try:
        with chdir("."):
            yield
    except (Exception, SystemExit) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and f"{module}.".startswith(f"{absent}."):
            raise ConfigError(
                f"{who}: there is no module {absent} in {Path.cwd()} or among the installed"
                " packages; name a file by its path, with .py"
            ) from error
        fault = describe_fault(error, caller=__file__)
        raise ConfigError(f"{who}: {action} raised {fault}") from error


def source_file(function: Callable[..., Any]) -> str | None:
    """The file that defines a function, or the class of a callable object; None if it is not Python
    source. Looks inside decorators and partials."""
    while isinstance(function, functools.partial):
        function = function.func
    inner = inspect.unwrap(function)
    try:
        return inspect.getsourcefile(
            inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner)
        )
    except (TypeError, OSError):
        return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "no functions"

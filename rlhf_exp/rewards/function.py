"""Scores from a Python function that the user names, called as TRL calls reward functions.

It knows how to find and call the function; what it computes is the user's.
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
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from inspect import Parameter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rewards.samples import Samples, read_samples, read_scores
from rlhf_exp.settings import ConfigError, Text, settings
from rlhf_exp.types import Completions

OWN_ARGUMENTS = ("prompts", "completions", "completion_ids")
BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@settings
class FunctionReward:
    """What `function` gives, a "module:callable" or "path/to/file.py:callable".

    It is called as f(prompts=..., completions=..., completion_ids=..., **columns), each a list with
    an entry for every sample, or with those of them that its signature names. Prompts that are
    conversations come as messages, their completions as a message of the assistant. Coroutines
    are awaited, all of them on one event loop.
    """

    function: Text
    """module:callable or path/to/file.py:callable."""

    def fingerprint(self) -> str:
        """The SHA-256 of the file that the callable is defined in, after that of the module that
        is named where this is another one; "" for what is not written in Python. Raises ConfigError
        as `load` does."""
        found = find_function(self.function)
        files = dict.fromkeys((found.module.__dict__.get("__file__"), source_file(found.function)))
        sources = [Path(file).read_bytes() for file in files if file and file.endswith(".py")]
        return hashlib.sha256(b"".join(sources)).hexdigest() if sources else ""

    def load(self, device: torch.device) -> RewardFunction:
        """The function. Raises ConfigError if there is no such callable, if importing it fails, and
        if it does not take completions."""
        who = f"reward.function={self.function}"
        function = find_function(self.function).function
        parameters = inspect.signature(function).parameters
        # One loop for all calls: clients that the user's module holds are bound to the loop that
        # they were first used on.
        runners = [asyncio.Runner()]

        def call(given: Mapping[str, list[Any]]) -> Any:
            result = function(**given)
            if not inspect.isawaitable(result):
                return result
            if runners[-1].get_loop().is_running():  # a call that hangs has it, on another thread
                runners.append(asyncio.Runner())
            return runners[-1].run(_wait_for(result))

        def score(completions: Completions) -> torch.Tensor:
            samples = read_samples(completions)
            given = arguments(parameters, samples, who=who)
            try:
                values = call(given)
            except FAULTS as error:
                # Read anew, since the call may have changed the lists before it failed.
                again = arguments(parameters, read_samples(completions), who=who)
                where = _line(error, source_file(function))
                raise RewardError(
                    f"{who} raised {_describe(error)}{where}\n{_culprit(call, again, samples)}"
                ) from error
            scores = read_scores(values, samples, who=who)
            return torch.tensor(scores, dtype=torch.float32, device=device)

        weakref.finalize(score, _close, runners)
        return score


# What a function of the user's may raise; sys.exit() and a cancelled task are no Exception.
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
    """The arguments by name: all that there are for a function with **kwargs, else those that it
    names. Raises RewardError if it needs a column that the samples lack, and for a column with the
    name of one of our own arguments."""
    clash = sorted(samples.columns.keys() & set(OWN_ARGUMENTS))
    if clash:
        raise RewardError(
            f"{who}: the dataset has a column {clash[0]!r}, which is what the reward's own argument"
            f" is called; rename the column\n{samples.show(0)}"
        )
    given = {
        "prompts": samples.prompts,
        "completions": samples.completions,
        "completion_ids": samples.completion_ids,
        **samples.columns,
    }
    named = [p for p in parameters.values() if p.kind in BY_NAME]
    missing = [p.name for p in named if p.default is Parameter.empty and p.name not in given]
    if missing:
        raise RewardError(
            f"{who} needs {', '.join(missing)}, but the samples have no column of that name; there"
            f" are {', '.join(given)}\n{samples.show(0)}"
        )
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return given
    return {p.name: given[p.name] for p in named if p.name in given}


def _culprit(
    call: Callable[[Mapping[str, list[Any]]], Any],
    given: Mapping[str, list[Any]],
    samples: Samples,
) -> str:
    """What to say of a batch's samples after it has failed: the first that fails by itself."""
    for index in range(len(samples)):
        try:
            call({name: entries[index : index + 1] for name, entries in given.items()})
        except FAULTS:
            return f"so it does for one sample alone, {samples.show(index)}"
    return (
        f"it raises nothing for any of the {len(samples)} samples alone; the first is"
        f" {samples.show(0)}"
    )


@dataclass(frozen=True, kw_only=True)
class Found:
    """The function that was asked for, and the module that was named."""

    function: Callable[..., Any]
    module: ModuleType


def find_function(name: str) -> Found:
    """The callable "module:callable" or "path/to/file.py:callable". Raises ConfigError with what is
    wrong with it."""
    who = f"reward.function={name}"
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
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        close = difflib.get_close_matches(attribute, own, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {_listed(own)}"
        file = module.__dict__.get("__file__") or place
        raise ConfigError(f"{who}: there is no {attribute} in {file}; {hint}") from error
    if not callable(function):
        raise ConfigError(
            f"{who}: {attribute} is no function but {type(function).__name__}"
            f" {reprlib.repr(function)}; name a callable"
        )
    _check_signature(function, who)
    return Found(function=function, module=module)


def _check_signature(function: Callable[..., Any], who: str) -> None:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{who}: it has no signature to read; wrap it in a def") from error
    for parameter in signature.parameters.values():
        if parameter.kind is Parameter.VAR_KEYWORD:
            return
        if parameter.name == "completions" and parameter.kind in BY_NAME:
            return
    raise ConfigError(
        f"{who}: it takes {signature}, but must take the keyword completions, or **kwargs: def"
        " f(prompts, completions, **kwargs)"
    )


def _import_module(name: str, who: str) -> ModuleType:
    _make_importable(Path.cwd())
    with _telling(who, f"importing {name}", wanted=name):
        return importlib.import_module(name)


def _import_file(path: Path, who: str) -> ModuleType:
    """The file as a module, run again only if it has changed."""
    file = path.resolve()
    spec = spec_from_file_location(_module_name(file, who), file)
    if spec is None:
        raise ConfigError(f"{who}: {file} is no Python file; its name must end in .py")
    if spec.name in sys.modules:
        return sys.modules[spec.name]
    _make_importable(file.parent)
    module = module_from_spec(spec)
    # Dataclasses and pickles look up the module that they are defined in.
    sys.modules[spec.name] = module
    try:
        with _telling(who, f"running {file}"):
            # Not by the loader: its cache takes a file for unchanged if it was changed within the
            # second and has the same size.
            exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _module_name(file: Path, who: str) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{who}: cannot read {file}: {error.strerror}") from error
    digest = hashlib.sha256(str(file).encode() + b"\0" + content).hexdigest()
    return f"{file.stem}_{digest[:12]}"


def _make_importable(folder: Path) -> None:
    """Puts the folder behind all others, so that no file in it comes before a library that
    something else has yet to import."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@contextmanager
def _telling(who: str, action: str, *, wanted: str = "") -> Iterator[None]:
    """Turns whatever the user's module raises into ConfigError; that it is not there is told
    apart. The process's folder is afterwards what it was."""
    try:
        with chdir("."):
            yield
    except ModuleNotFoundError as error:
        if error.name is not None and f"{wanted}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{who}: there is no module {error.name} in {Path.cwd()} or among the installed"
                " ones; a file is given by its path, with .py"
            ) from error
        raise ConfigError(f"{who}: {action} raised {_describe(error)}{_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{who}: {action} raised {_describe(error)}{_line(error)}") from error


def source_file(function: Callable[..., Any]) -> str | None:
    """The file that a function, or the class of a callable object, is written in; None for one
    that is not written in Python. What a decorator or a partial wraps counts."""
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


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300].rstrip(": ")


def _line(error: BaseException, file: str | None = None) -> str:
    """ " at FILE:LINE", the innermost one in `file`, else of all that are called from here; "" for
    none and for a SyntaxError, which says itself where it is."""
    if isinstance(error, SyntaxError):
        return ""
    calls = list(traceback.extract_tb(error.__traceback__))
    while any(call.filename == __file__ for call in calls):
        calls = calls[1:]
    # Not where a library was when it raised, or W&B, which puts itself in the place of sys.exit.
    own = [call for call in calls if "site-packages" not in Path(call.filename).parts]
    found = [call for call in calls if call.filename == file] or own or calls
    return f" at {found[-1].filename}:{found[-1].lineno}" if found else ""

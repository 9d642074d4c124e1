"""The user's function that looks at the policy after phases: `stage.on_phase`.

It may fail and it may draw random numbers: training goes on as if it had not been called.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rewards.faults import describe_fault
from rlhf_exp.rewards.function import FAULTS, import_function, signature_of, source_file
from rlhf_exp.settings import ConfigError
from rlhf_exp.training.seeding import SharedRandomness
from rlhf_exp.types import Rollout

log = logging.getLogger(__name__)

PREFIX = "own/"
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
ARGUMENTS = ("policy", "phase", "rollout")


def find_hook(name: str) -> Callable[..., Any]:
    """The callable "module:callable" or "path/to/file.py:callable". Raises ConfigError if it cannot
    be imported or cannot be called with the arguments of a hook."""
    who = f"stage.on_phase={name}"
    function, _ = import_function(name, who=who)
    signature = signature_of(function, who=who)
    try:
        signature.bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        raise ConfigError(
            f"{who}: it takes {signature}, but must take the keywords policy, phase and rollout:"
            " def f(policy, phase, rollout), or def f(policy, **rest)"
        ) from error
    return function


@dataclass(frozen=True, kw_only=True)
class PhaseHook:
    """Calls `function`, found under `name`, every `every` phases and after the last one."""

    name: str
    function: Callable[..., Any]
    every: int
    total_phases: int
    reported: set[str] = field(default_factory=set)
    """The problems that have been logged."""

    def __call__(
        self, policy: TransformerWithValueHead, phase: int, rollout: Rollout
    ) -> dict[str, float]:
        """The function's numbers, their names prefixed, if the phase is due. Logs a warning for a
        function that raises or returns something else, once for each problem."""
        if phase % self.every and phase != self.total_phases:
            return {}
        with unchanged(policy):
            try:
                result = self.function(policy=policy, phase=phase, rollout=rollout)
                return read_numbers(result)
            except _NotNumbersError as error:
                problem = f"returned {error}"
            except FAULTS as error:
                file = source_file(self.function)
                problem = f"raised {describe_fault(error, caller=__file__, file=file)}"
        if problem not in self.reported:
            self.reported.add(problem)
            log.warning(
                "phase %d: stage.on_phase=%s %s; training goes on", phase, self.name, problem
            )
        return {}


@contextmanager
def unchanged(policy: nn.Module) -> Iterator[None]:
    """A context without gradients, after which the global random generators, the modes of the
    modules, and gradients and requires_grad of the parameters are as before."""
    generators = SharedRandomness()
    state = generators.state_dict()
    modes = [(module, module.training) for module in policy.modules()]
    # A gradient that the block adds to is cleared before the next step, but one that it makes or
    # removes would change which weights Adam moves.
    weights = [(weight, weight.requires_grad, weight.grad) for weight in policy.parameters()]
    try:
        with torch.no_grad():
            yield
    finally:
        generators.load_state_dict(state)
        for module, training in modes:
            module.training = training
        for weight, requires_grad, gradient in weights:
            weight.requires_grad_(requires_grad)
            weight.grad = gradient


class _NotNumbersError(ValueError):
    """What a hook returned are not numbers by name."""


def read_numbers(result: Any) -> dict[str, float]:
    """The numbers that a hook returned, their names prefixed; none for None. Raises ValueError for
    something else."""
    if result is None:
        return {}
    if not isinstance(result, Mapping):
        raise _NotNumbersError(f"{type(result).__name__}, not a dict of numbers by name")
    numbers = {}
    for name, value in result.items():
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise _NotNumbersError(
                f"the name {name!r}: names are of letters, digits, _ . - and, between them, /"
            )
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not isinstance(number, Real):
            raise _NotNumbersError(f"{type(value).__name__} as {name}, not a number")
        numbers[PREFIX + name] = float(number)
    return numbers

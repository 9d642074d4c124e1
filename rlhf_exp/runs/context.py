"""The context of a stage's run, besides its parts: the folder, the device, the seed."""

from dataclasses import dataclass, field

import torch

from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.runs.presentation import Presentation
from rlhf_exp.runs.stopping import StopRequests
from rlhf_exp.settings import ConfigError


@dataclass(frozen=True, kw_only=True)
class Context:
    """The context of one run of one stage. A resumed run continues from the newest checkpoint in
    its folder, or starts over without one; `stop` can end it early. Tables and figures that the
    stage adds to `presentation` are shown after its result is written."""

    folder: RunFolder
    seed: int
    device: torch.device
    resume: bool = False
    stop: StopRequests = field(default_factory=StopRequests)
    presentation: Presentation = field(default_factory=Presentation)


class TrainingError(RuntimeError):
    """A run that cannot go on: the message names the phase or step and the cause."""

    exit_code = 1


def pick_device(name: str) -> torch.device:
    """The device; "auto" is CUDA if available, else the CPU. Raises ConfigError if it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: this machine has no CUDA device; use device=cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={name}: this machine has no MPS device; use device=cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name}: use auto, cpu, cuda, cuda:N or mps") from error

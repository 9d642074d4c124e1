"""The entry point of `python train.py` and the console script `rlhf-exp`: Hydra's main."""

import rlhf_exp.machine.environment  # noqa: F401, I001  first: it must precede the import of torch

import functools
import sys

import hydra
from omegaconf import DictConfig

from rlhf_exp.app import run
from rlhf_exp.app.options import COMMENTS, print_commented
from rlhf_exp.machine.locations import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def hydra_main(cfg: DictConfig) -> None:
    """Runs one job."""
    run.job(cfg)


def main() -> None:
    """Runs the command line of this process and exits with its exit code."""
    run.guard(
        functools.partial(print_commented, hydra_main) if COMMENTS in sys.argv else hydra_main
    )

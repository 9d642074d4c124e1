"""The one entrypoint: `python train.py [key=value ...]`, sweeps with -m; see README.md."""

import rlhf_exp.machine.environment  # noqa: F401, I001  first: it must precede the import of torch

import hydra
from omegaconf import DictConfig

from rlhf_exp.app import run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """One job."""
    run.job(cfg)


if __name__ == "__main__":
    run.guard(main)

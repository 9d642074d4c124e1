"""The one entrypoint: `python train.py [key=value ...]`, sweeps with -m; see README.md."""

import os

# OpenMP's threads spin while they wait; with as many jobs as cores, that makes a job tens of times
# slower. Not to spin at all makes small models up to twice as slow, since they wait often; so they
# spin for a moment. To be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import hydra
from omegaconf import DictConfig

from rlhf_exp import run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """One job."""
    run.job(cfg)


if __name__ == "__main__":
    run.guard(main)

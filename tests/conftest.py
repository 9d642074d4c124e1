"""The process that train.py makes, for tests."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: threads would fight for cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import rlhf_exp.environment  # noqa: F401, I001  it must precede the import of torch

from rlhf_exp.training.processor import use_processor_well

use_processor_well()

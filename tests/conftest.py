"""The process that train.py makes, for tests."""

import rlhf_exp.environment  # noqa: F401, I001  first: it must precede the import of torch

from rlhf_exp.training.processor import use_processor_well

use_processor_well()

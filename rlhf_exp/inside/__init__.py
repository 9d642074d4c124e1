"""A look inside a run: the models before and after training, and what changed between them.

It reads a run's folder and never trains. Nothing but scripts and notebooks imports it.
"""

from rlhf_exp.inside.loading import (
    Pair,
    load_bridges,
    load_pair,
    load_policy,
    open_run,
    trajectory,
)

__all__ = ["Pair", "load_bridges", "load_pair", "load_policy", "open_run", "trajectory"]

"""The process that train.py makes, for tests."""

import gc
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: threads would fight for cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import rlhf_exp.machine.environment  # noqa: F401, I001  it must precede the import of torch

from rlhf_exp.machine.cpu_settings import use_processor_well
from tests.forked import compose_once

use_processor_well()
compose_once()

# Ignored where the tests were started in the background or under nohup; what they start would
# ignore them too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The files that take longest, the longest first: begun last, one would leave the other processes
# without work. `make test` keeps this order.
LONGEST = (
    "test_sweeps.py", "test_cli.py", "test_arithmetic.py", "test_conf.py",
    "test_config_property.py", "test_resume.py", "test_wandb_logger.py", "test_ppo_run.py",
)  # fmt: skip

# Folders whose tests build models: of each matrix of parameters there, `make test` runs cells in
# which each value occurs, as of one that is marked.
SAMPLED = {"models", "rl", "rollout", "stages"}


@pytest.hookimpl(tryfirst=True)  # before those that are marked are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
    matrices = defaultdict(list)
    for item in items:
        is_sampled = item.path.parent.name in SAMPLED or item.get_closest_marker("sampled")
        if is_sampled and hasattr(item, "callspec"):
            matrices[item.nodeid.partition("[")[0]].append(item)
    for matrix in matrices.values():
        often: Counter[tuple[str, str]] = Counter()
        for item in random.Random(0).sample(matrix, len(matrix)):
            values = values_of(item)
            if all(often[value] for value in values):
                item.add_marker("soak")
            else:
                often.update(values)


def values_of(item: pytest.Item) -> list[tuple[str, str]]:
    """The value of each parameter of a test; those that one decorator sets together are one."""
    chosen = {**item.callspec.params}  # type: ignore[attr-defined]
    axes = [mark.args[0] for mark in item.iter_markers("parametrize")]
    axes = [names.split(", ") if isinstance(names, str) else names for names in axes]
    values = [(str(names), repr([chosen.pop(name) for name in names])) for names in axes]
    return [*values, *((name, repr(value)) for name, value in chosen.items())]


def pytest_collection_finish() -> None:
    """Spares the collector the million objects of imported libraries, through which it goes again
    and again: a fifth of the time of all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the checks of shapes, for runs that take long under them."""
    from tests.builders import without_checks  # not above: the checks are not set up yet there

    with without_checks():
        yield

"""The process that train.py makes, for tests."""

import os
import signal
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: threads would fight for cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import rlhf_exp.machine.environment  # noqa: F401, I001  it must precede the import of torch

from rlhf_exp.machine.cpu_settings import use_processor_well

use_processor_well()

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the checks of shapes, for runs that take long under them."""
    from tests.builders import without_checks  # not above: the checks are not set up yet there

    with without_checks():
        yield

import subprocess
import sys
import time

import pytest

from rlhf_exp.machine.timing import Stopwatch, process_age_s


def test_a_stopwatch_adds_up_by_part():
    clock = Stopwatch()
    for _ in range(2):
        with clock("sleep"):
            time.sleep(0.02)
    with clock("nothing"):
        pass
    assert list(clock.seconds) == ["sleep", "nothing"]
    assert 0.04 <= clock.seconds["sleep"] < 5
    assert clock.seconds["nothing"] < clock.seconds["sleep"]


def test_a_block_that_raises_is_not_counted():
    clock = Stopwatch()
    with pytest.raises(KeyError), clock("part"):
        raise KeyError
    assert clock.seconds == {}


def test_a_process_counts_from_its_start():
    before = time.time()
    script = "import time; time.sleep(0.2); from rlhf_exp.machine import timing; "
    script += "print(timing.process_age_s())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    # The start time of a process is known to 10 ms.
    assert 0.19 < float(done.stdout) < time.time() - before + 0.02
    assert process_age_s() > time.time() - before

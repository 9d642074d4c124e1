"""A GPU has no more jobs than it may, whatever happens to the processes that hold it."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from rlhf_exp.settings import ConfigError
from rlhf_exp.sweeps import leases
from rlhf_exp.sweeps.leases import find_gpus, lease, leased_gpu

ROOT = Path(__file__).parents[2]
# Processes take leases, write who holds each GPU into shared memory, and are killed at random.
# Whoever finds the number of another process there, which has not been killed, has found a GPU that
# is held twice.
KILLS = """
import mmap, os, random, signal, sys, time
from pathlib import Path
from rlhf_exp.sweeps import leases

KILLS, WORKERS, GPUS = 200, 4, ("0", "1")
leases.POLL_S = 0.001
folder = Path(sys.argv[1])
memory = memoryview(mmap.mmap(-1, 8 * 4096)).cast("q")
holder, leased, wrong, killed = memory[0:2], memory[2:3], memory[4:5], memory[8:]

def work(me):
    rng = random.Random(me)
    while True:
        with leases.lease(GPUS, 1, folder=folder) as gpu:
            before, holder[int(gpu)] = holder[int(gpu)], me
            time.sleep(rng.random() * 0.002)
            if (before and not killed[before]) or holder[int(gpu)] != me:
                wrong[0] += 1
            leased[0] += 1
            holder[int(gpu)] = 0

def start(me):
    pid = os.fork()
    if pid == 0:
        work(me)
    return me, pid

rng = random.Random(1)
workers = [start(me) for me in range(1, WORKERS + 1)]
for kill in range(KILLS):
    time.sleep(rng.random() * 0.01)
    me, pid = workers.pop(rng.randrange(WORKERS))
    killed[me] = 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    workers.append(start(WORKERS + 1 + kill))
before = leased[0]
while leased[0] < before + 20:  # those that are left still get leases
    time.sleep(0.01)
for me, pid in workers:
    os.kill(pid, signal.SIGKILL)
print([leased[0] > KILLS, wrong[0]])
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leases, "POLL_S", 0.01)


def cuda_sees(monkeypatch, *names: str) -> None:
    """Has CUDA know GPUs of these names, of which it counts those that are visible as it does: up
    to the first that it does not know."""

    def count() -> int:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(names)).split(",")
        return next((i for i, name in enumerate(visible) if name not in names), len(visible))

    monkeypatch.setattr(torch.cuda, "device_count", count)


def test_no_gpu_is_held_twice_when_processes_are_killed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path / "leases")],
        capture_output=True, text=True, timeout=100, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert json.loads(done.stdout.lower()) == [True, 0]


def test_jobs_spread_over_the_gpus_and_then_share_them(tmp_path):
    with lease("ab", 2, folder=tmp_path) as first, lease("ab", 2, folder=tmp_path) as second:
        assert {first, second} == {"a", "b"}
        with lease("ab", 2, folder=tmp_path) as third, lease("ab", 2, folder=tmp_path) as fourth:
            assert {third, fourth} == {"a", "b"}


def test_a_job_waits_until_a_gpu_is_free(tmp_path, caplog):
    caplog.set_level("INFO")
    leased: list[str] = []

    def job() -> None:
        with lease(("0", "1"), 1, folder=tmp_path) as gpu:
            leased.append(gpu)

    waiting = threading.Thread(target=job)
    with lease(("0",), 1, folder=tmp_path):
        with lease(("1",), 1, folder=tmp_path):
            waiting.start()
            waiting.join(0.1)
            assert waiting.is_alive()
        waiting.join(10)
    assert leased == ["1"]
    assert caplog.messages == ["waiting for a GPU: 0, 1 are taken"]


@pytest.mark.parametrize(("mine", "others"), [(1, 2), (2, 1)])
def test_a_gpu_is_shared_only_if_both_sweeps_share_it(tmp_path, mine, others):
    with lease(("0",), mine, folder=tmp_path):
        assert leases._try_to_lease(("0",), others, tmp_path) is None
    with lease(("0",), others, folder=tmp_path) as gpu:
        assert gpu == "0"


def test_names_are_kept_apart(tmp_path):
    names = ("1", "11", "GPU-1f", "MIG-GPU-1f/1/0", "MIG-GPU-1f/1/1")
    held = [leases._try_to_lease(names, 1, tmp_path) for _ in names]
    assert [gpu for gpu, _ in filter(None, held)] == [*names]
    assert leases._try_to_lease(names, 1, tmp_path) is None


def test_a_job_sees_only_the_gpu_that_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("RLHF_EXP_GPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RLHF_EXP_GPUS", "0,1")
    monkeypatch.setenv("RLHF_EXP_JOBS_PER_GPU", "1")
    with leased_gpu("cpu"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    with leased_gpu("auto"), lease(("0", "1"), 1, folder=leases.lease_folder()) as other:
        assert other == "1"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == os.environ["RLHF_EXP_GPU"] == "0"
    assert leases.lease_folder().is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("known", "visible", "gpus", "names"),
    [
        ("0,1", None, "auto", ("0", "1")),
        ("0,1", None, ("1",), ("1",)),
        ("0,1,2", "2,1", "auto", ("2", "1")),
        ("0,1,2", "2, 1", ("1",), ("1",)),
        ("0", "0,7", "auto", ("0",)),
        ("0,1", "", "auto", ()),
        ("MIG-a,MIG-b", "MIG-b", "auto", ("MIG-b",)),
        ("0,1", None, None, ()),
    ],
)
def test_the_gpus_are_those_that_cuda_sees(monkeypatch, known, visible, gpus, names):
    cuda_sees(monkeypatch, *known.split(","))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpus(gpus) == names
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_without_cuda_auto_is_none(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_gpus("auto") == ()


@pytest.mark.parametrize(
    ("visible", "gpus", "message"),
    [
        (None, ("0", "5"), "gpus: CUDA sees no GPU 5 on this machine"),
        ("2,3", ("0",), "gpus: 0 is not in CUDA_VISIBLE_DEVICES=2,3: name some of these"),
    ],
)
def test_a_gpu_that_cuda_does_not_see_is_refused(monkeypatch, visible, gpus, message):
    cuda_sees(monkeypatch, "0", "1", "2", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=message):
        find_gpus(gpus)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible

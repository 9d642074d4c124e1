"""Settings of the process: products stay exact, freed memory stays, the user's word is last."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from rlhf_exp.machine.cpu_settings import keep_freed_memory, use_fast_fp32_products


@pytest.mark.parametrize("size", [(256, 256, 256), (7, 300, 5), (64, 768, 3072), (1, 1000, 17)])
def test_products_are_exact_to_fp32(size: tuple[int, int, int]) -> None:
    assert use_fast_fp32_products() in (True, False)
    rows, inner, columns = size
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(rows, inner, generator=generator)
    b = torch.randn(inner, columns, generator=generator)
    exact = a.double() @ b.double()
    # A product rounded to bf16 on the way is off by some 1e-3.
    for product in (a @ b, torch.nn.functional.linear(a, b.T.contiguous())):
        assert (product - exact).abs().max() < 2e-6 * exact.abs().max()


def in_a_process(code: str, **environment: str) -> dict:
    """What the code prints as JSON, in a process with none of our variables but these."""
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_products_that_would_be_rounded_are_not_taken() -> None:
    # Whatever this processor does with the permission: it is kept only where it changes nothing.
    code = """
import json, torch
matmul = torch.backends.mkldnn.matmul
before = matmul.fp32_precision
from rlhf_exp.machine.cpu_settings import use_fast_fp32_products
used = use_fast_fp32_products()
after = matmul.fp32_precision
torch.manual_seed(0)
a, b = torch.randn(300, 300), torch.randn(300, 300)
exact = a.double() @ b.double()
error = ((a @ b - exact).abs().max() / exact.abs().max()).item()
print(json.dumps([before, used, after, error]))
"""
    before, used, after, error = in_a_process(code)
    assert after == ("bf16" if used else before)
    assert error < 1e-6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_freed_memory_is_used_again() -> None:
    # Page faults of tensors of 32 MiB that take the place of those just freed, before and after;
    # the least of a few times, since where they come to lie has to settle.
    code = """
import json, resource, torch
from rlhf_exp.machine.cpu_settings import keep_freed_memory
def faults():
    counts = []
    for _ in range(6):
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        torch.zeros(2**23) + 1
    return min(b - a for a, b in zip(counts, counts[1:]))
print(json.dumps([faults(), keep_freed_memory(), faults()]))
"""
    before, kept, after = in_a_process(code)
    assert kept is True
    assert before >= 16  # as many large pages as that, or many more small ones
    assert after < before / 8


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert keep_freed_memory() is False


READ = """
import json, os, sys
import rlhf_exp.machine.environment
assert "torch" not in sys.modules
names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")
print(json.dumps({name: os.environ.get(name) for name in names}))
"""
DEFAULTS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "2000",
    "THP_MEM_ALLOC_ENABLE": "1",
}


def test_the_environment_is_set_before_torch_is_there() -> None:
    assert in_a_process(READ) == DEFAULTS


def test_what_the_user_has_set_stays() -> None:
    for name, value in (("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", ""), (
        "THP_MEM_ALLOC_ENABLE", "0")):  # fmt: skip
        assert in_a_process(READ, **{name: value}) == DEFAULTS | {name: value}


def test_the_entrypoint_sets_it_first() -> None:
    code = """
import json, os, sys
sys.argv = ["train.py"]
class Stop(Exception): pass
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "hydra"):
            raise Stop
sys.meta_path.insert(0, Finder())
try:
    import train
except Stop:
    print(json.dumps(os.environ["GOMP_SPINCOUNT"]))
"""
    assert in_a_process(code) == "2000"

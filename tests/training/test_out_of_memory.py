"""Out of memory: told from other errors, and said in a few lines."""

import pytest
import torch

from rlhf_exp.runs.context import TrainingError
from rlhf_exp.training.out_of_memory import explaining_memory, is_out_of_memory

TOO_MUCH = 2**50  # bytes that no machine has


def allocate():
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def grow():
    bytearray(2**62)


def exhaust_gpu():
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB of"
        " which 1 GiB is free. If reserved but unallocated memory is large try setting"
    )


def exhaust_cublas():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (allocate, "you tried to allocate 1125899906842624 bytes"),
        (grow, "MemoryError"),
        (exhaust_gpu, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (exhaust_cublas, "CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_it_is_said_what_was_done_and_what_needs_less(fail, reason):
    with (
        pytest.raises(TrainingError) as raised,
        explaining_memory("phase 3: sampling", ["lower a", "lower b"]),
    ):
        fail()
    doing, why, knobs = str(raised.value).splitlines()
    assert doing == "phase 3: sampling: out of memory"
    assert reason in why
    assert "capacity" not in why
    assert knobs == "to need less: lower a; lower b"
    assert is_out_of_memory(raised.value.__cause__)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_other_errors_are_left_as_they_are(error):
    with pytest.raises(type(error)) as raised, explaining_memory("learning", ["lower a"]):
        raise error
    assert raised.value is error

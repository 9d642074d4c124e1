import dataclasses

import pytest
import torch

from rlhf_exp.runs.context import Context, pick_device
from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.settings import ConfigError

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def test_devices_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("cuda", "device=cuda: .* no CUDA device; use device=cpu", marks=without_cuda),
        pytest.param("cuda:1", "device=cuda:1: .* use device=cpu", marks=without_cuda),
        pytest.param("mps", "device=mps: .* no MPS device", marks=without_cuda),
        ("gpu", "device=gpu: use auto, cpu, cuda"),
        ("", "device=: use auto"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        pick_device(name)


def test_a_context_is_frozen(tmp_path):
    context = Context(folder=RunFolder(tmp_path), seed=1, device=torch.device("cpu"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.seed = 2

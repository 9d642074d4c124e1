import pytest
import torch

from rlhf_exp.machine.precision import autocast, compute_dtype, computes_bf16, fp32_logits

CPU = torch.device("cpu")


def product_dtype(dtype: str) -> torch.dtype:
    with autocast(dtype, CPU):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_products_are_computed_as_asked():
    assert product_dtype("fp32") == torch.float32
    assert product_dtype("bf16") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, False),
        ({"avx512_vnni": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True}, True),
    ],
)
def test_auto_is_half_where_the_processor_has_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert computes_bf16(CPU) is expected
    auto = torch.bfloat16 if expected else torch.float32
    for asked, used in (("auto", auto), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert compute_dtype(asked, CPU, width=192) == used
        assert product_dtype(asked) == used


def test_a_cpu_takes_narrow_models_in_fp32_unless_told(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert compute_dtype("auto", CPU, width=191) == torch.float32
    assert compute_dtype("bf16", CPU, width=191) == torch.bfloat16
    assert compute_dtype("auto", CPU, width=192) == torch.bfloat16
    assert compute_dtype("auto", torch.device("cuda"), width=191) == torch.bfloat16


def test_a_gpu_is_asked_for_what_it_does_without_emulation(monkeypatch):
    asked = []

    def is_supported(including_emulation):
        asked.append(including_emulation)
        return True

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert computes_bf16(torch.device("cuda"))
    assert asked == [False]
    assert compute_dtype("auto", torch.device("cuda"), width=768) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert compute_dtype("auto", torch.device("cuda"), width=768) == torch.float32


def test_other_devices_do_not():
    assert not computes_bf16(torch.device("mps"))
    assert compute_dtype("auto", torch.device("mps"), width=768) == torch.float32


def test_logits_are_computed_in_fp32_under_autocast():
    head, hidden = torch.nn.Linear(3, 5), torch.randn(2, 3).bfloat16()
    expected = torch.nn.functional.linear(hidden.float(), head.weight, head.bias)
    with autocast("bf16", CPU):
        with fp32_logits(head):
            torch.testing.assert_close(head(hidden), expected)
        assert head(hidden).dtype == torch.bfloat16

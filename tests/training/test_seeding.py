import pytest
import torch

from rlhf_exp.training.seeding import stream, stream_seed


def test_a_seed_is_the_same_on_every_machine():
    # The first 14 hexadecimal digits of `printf 1/samples | sha256sum`.
    assert stream_seed(1, "samples") == 0xD1349FFC3A808D


@pytest.mark.parametrize(("seed", "purpose"), [(2, "samples"), (1, "prompts"), (11, "samples")])
def test_every_seed_and_purpose_has_its_own(seed, purpose):
    assert stream_seed(seed, purpose) != stream_seed(1, "samples")


def test_a_stream_repeats_and_is_drawn_from_alone():
    first = torch.rand(4, generator=stream(1, "samples"))
    other = stream(1, "prompts")
    torch.rand(100, generator=other)
    torch.rand(100)
    assert torch.equal(torch.rand(4, generator=stream(1, "samples")), first)
    assert not torch.equal(torch.rand(4, generator=stream(1, "prompts")), first)

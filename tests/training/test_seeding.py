import random

import numpy as np
import pytest
import torch

from rlhf_exp.training.seeding import (
    SharedRandomness,
    make_generator,
    seed_shared_generators,
    stream_seed,
)

from ..states import through_a_file


def test_a_seed_is_the_same_on_every_machine():
    # The first 14 hexadecimal digits of `printf 1/samples | sha256sum`.
    assert stream_seed(1, "samples") == 0xD1349FFC3A808D


@pytest.mark.parametrize(("seed", "purpose"), [(2, "samples"), (1, "prompts"), (11, "samples")])
def test_every_seed_and_purpose_has_its_own(seed, purpose):
    assert stream_seed(seed, purpose) != stream_seed(1, "samples")


def test_a_stream_repeats_and_is_drawn_from_alone():
    first = torch.rand(4, generator=make_generator(1, "samples"))
    other = make_generator(1, "prompts")
    torch.rand(100, generator=other)
    torch.rand(100)
    assert torch.equal(torch.rand(4, generator=make_generator(1, "samples")), first)
    assert not torch.equal(torch.rand(4, generator=make_generator(1, "prompts")), first)


def draws():
    normal = random.gauss(0, 1), float(np.random.standard_normal())  # both keep a second one
    return [*normal, random.random(), float(np.random.rand()), *torch.rand(3).tolist()]


def test_the_shared_generators_are_seeded_together():
    seed_shared_generators(1)
    first = draws()
    seed_shared_generators(1)
    assert draws() == first
    seed_shared_generators(2)
    assert not set(draws()) & set(first)


def test_the_shared_generators_go_on_from_where_they_stood(tmp_path):
    seed_shared_generators(1)
    draws()
    state = SharedRandomness().state_dict()
    expected = draws(), draws()
    state = through_a_file(state, tmp_path)
    seed_shared_generators(9)
    SharedRandomness().load_state_dict(state)
    assert (draws(), draws()) == expected

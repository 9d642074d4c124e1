import pytest
import torch

from rlhf_exp.machine.threads import WORTH_SHARING, threads_for


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("work", "threads"), [(WORTH_SHARING - 1, 1), (WORTH_SHARING, 2)])
def test_little_work_is_not_shared(two_threads, work, threads):
    with threads_for(work):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_the_threads_are_back_after_an_error(two_threads):
    with pytest.raises(KeyError), threads_for(0):
        raise KeyError
    assert torch.get_num_threads() == 2

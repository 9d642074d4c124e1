"""States as `state_dict` gives them, compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlhf_exp.runs.checkpoint import read_checkpoint, write_checkpoint
from rlhf_exp.training.saver import join_state, split_state


def through_a_file(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The state as a checkpoint below `path` gives it back."""
    return join_state(*read_checkpoint(write_checkpoint(path, 1, *split_state(state))))


def assert_equal_states(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Compares all but the seconds of the clock."""
    (tensors, numbers), (other_tensors, other_numbers) = map(split_state, (one, other))
    assert _timeless(numbers) == _timeless(other_numbers)
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == other_tensors[name].dtype, name
        assert torch.equal(tensor, other_tensors[name]), name


def _timeless(numbers: Any) -> Any:
    if not isinstance(numbers, dict):
        return numbers
    return {key: _timeless(part) for key, part in numbers.items() if key != "seconds"}

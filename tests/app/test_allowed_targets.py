"""A configuration names what is allowed, without detours."""

import json
import shutil

import pytest
import torch

from rlhf_exp.app.allowed_targets import find_targets, forbidden_module, instructions, unusable
from rlhf_exp.rewards.length import Length
from rlhf_exp.settings import ConfigError

OWN = ("rlhf_exp.", "torch.optim.")
# Names as a configuration has them, and what they lead to.
NAMES = {
    "rlhf_exp.app.allowed_targets.find_targets": find_targets,
    "rlhf_exp.app.run.shutil": shutil,
    "rlhf_exp.app.run.shutil.rmtree": shutil.rmtree,
    "rlhf_exp.app.run.json.dumps": json.dumps,
    "mine.shutil.rmtree": shutil.rmtree,
    "rlhf_exp.settings.seven": 7,
    "rlhf_exp.rewards.length.Length": Length,
    "rlhf_exp.rewards.length.Length.load": Length.load,
    "rlhf_exp.app.run.__builtins__.get": {}.get,
    "rlhf_exp.settings.ConfigError": ConfigError,
    "torch.optim.Adam": torch.optim.Adam,
    "torch.optim.Adam.step": torch.optim.Adam.step,
}


def find(name: str) -> object:
    if name not in NAMES:
        raise ImportError(name)
    return NAMES[name]


@pytest.mark.parametrize(
    ("target", "allowed", "module"),
    [
        ("rlhf_exp.app.allowed_targets.find_targets", OWN, None),
        ("shutil.rmtree", OWN, "shutil"),
        ("os", OWN, "os"),
        # As long as a name begins alike it is still another one.
        ("rlhf_exp_evil.f", OWN, "rlhf_exp_evil"),
        ("torch.load", OWN, "torch"),
        # Through what an allowed module imports.
        ("rlhf_exp.app.run.shutil.rmtree", OWN, "shutil"),
        ("rlhf_exp.app.run.shutil", OWN, "shutil"),
        ("rlhf_exp.app.run.json.dumps", OWN, "json"),
        ("rlhf_exp.app.run.json.dumps", (*OWN, "json."), None),
        # Nothing that could be called, as who instantiates it will say.
        ("rlhf_exp.nothing.there", OWN, None),
        ("rlhf_exp.settings.seven", OWN, None),
        # A module that the user trusts may lead anywhere.
        ("mine.shutil.rmtree", (*OWN, "mine."), None),
        ("mine.shutil.rmtree", OWN, "mine.shutil"),
    ],
)
def test_the_module_that_is_not_allowed_is_named(target, allowed, module):
    assert forbidden_module(target, allowed, OWN, find=find) == module


@pytest.mark.parametrize(
    ("target", "refused"),
    [
        ("rlhf_exp.rewards.length.Length", False),
        ("torch.optim.Adam", False),
        ("mine.shutil.rmtree", False),
        ("rlhf_exp.nothing.there", False),
        # What does something when it is called, or is nothing that a configuration describes.
        ("rlhf_exp.app.allowed_targets.find_targets", True),
        ("rlhf_exp.rewards.length.Length.load", True),
        ("rlhf_exp.app.run.__builtins__.get", True),
        ("rlhf_exp.settings.ConfigError", True),
        ("rlhf_exp.settings.seven", True),
        ("torch.optim.Adam.step", True),
    ],
)
def test_of_our_own_names_those_of_settings_can_be_used(target, refused):
    assert unusable(target, OWN, find=find) == refused


def test_instructions_to_hydra_are_found_wherever_they_are():
    ours, theirs = {"_target_": "rlhf_exp.x"}, {"_target_": "torch.optim.SGD", "_partial_": True}
    assert [*instructions({**ours, "a": [theirs, {**ours, "_args_": [1]}]}, OWN[:1])] == ["_args_"]
    assert [*instructions({"_partial_": True, **ours}, OWN[:1])] == ["_partial_"]
    assert [*instructions([theirs, 3], OWN[:1])] == []


def test_all_targets_are_found_wherever_they_are():
    config = {
        "_target_": "a",
        "terms": {"x": {"_target_": "b", "n": 1}, "y": [{"_target_": "c"}, [{"_target_": "d"}], 3]},
        "target": "no",
        "none": None,
    }
    assert [target for _, target in find_targets(config, "x")] == ["a", "b", "c", "d"]
    assert [target for _, target in find_targets("text", "x")] == []

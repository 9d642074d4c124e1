"""A configuration names what is allowed, without detours."""

import json
import shutil

import pytest

from rlhf_exp.targets import forbidden_module, targets

OWN = ("rlhf_exp.", "torch.optim.")
# Names as a configuration has them, and what they lead to.
NAMES = {
    "rlhf_exp.targets.targets": targets,
    "rlhf_exp.run.shutil": shutil,
    "rlhf_exp.run.shutil.rmtree": shutil.rmtree,
    "rlhf_exp.run.json.dumps": json.dumps,
    "mine.shutil.rmtree": shutil.rmtree,
    "rlhf_exp.settings.seven": 7,
}


def find(name: str) -> object:
    if name not in NAMES:
        raise ImportError(name)
    return NAMES[name]


@pytest.mark.parametrize(
    ("target", "allowed", "module"),
    [
        ("rlhf_exp.targets.targets", OWN, None),
        ("shutil.rmtree", OWN, "shutil"),
        ("os", OWN, "os"),
        # As long as a name begins alike it is still another one.
        ("rlhf_exp_evil.f", OWN, "rlhf_exp_evil"),
        ("torch.load", OWN, "torch"),
        # Through what an allowed module imports.
        ("rlhf_exp.run.shutil.rmtree", OWN, "shutil"),
        ("rlhf_exp.run.shutil", OWN, "shutil"),
        ("rlhf_exp.run.json.dumps", OWN, "json"),
        ("rlhf_exp.run.json.dumps", (*OWN, "json."), None),
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


def test_all_targets_are_found_wherever_they_are():
    config = {
        "_target_": "a",
        "terms": {"x": {"_target_": "b", "n": 1}, "y": [{"_target_": "c"}, [{"_target_": "d"}], 3]},
        "target": "no",
        "none": None,
    }
    assert [*targets(config)] == ["a", "b", "c", "d"]
    assert [*targets("text")] == []

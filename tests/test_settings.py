import dataclasses
import math

import pytest
from pydantic import ValidationError

from rlhf_exp import settings as module
from rlhf_exp.settings import Count, Fraction, NonNegative, Text, settings

# What each type accepts and refuses besides what all of them refuse.
RANGES = {
    "Positive": ([1e-30, 5], [0, -1e-30]),
    "NonNegative": ([0, 5], [-1e-30]),
    "Real": ([-3.5, 0, 3.5], []),
    "Fraction": ([0, 0.5, 1], [-1e-9, 1 + 1e-9]),
    "OpenFraction": ([1e-9, 0.5, 1 - 1e-9], [0, 1]),
    "BelowOne": ([0, 0.5, 1 - 1e-9], [-1e-9, 1]),
    "BelowHalf": ([0, 0.25, 0.5 - 1e-9], [-1e-9, 0.5]),
    "Temperature": ([1e-3, 5], [0, 1e-4]),
    "TopP": ([1e-9, 1], [0, 1 + 1e-9]),
    "AboveOne": ([1.0001, 1e9], [1, 0, -2]),
    "Count": ([1, 10**9], [0, -1, 1.5]),
    "Index": ([0, 10**9], [-1, 0.5]),
}
ACCEPTED = [(name, value) for name, (good, _) in RANGES.items() for value in good]
REFUSED = [(name, value) for name, (_, bad) in RANGES.items() for value in bad]


def holder(name: str) -> type:
    """A settings class with one field of the type."""
    return settings(type("Holder", (), {"__annotations__": {"x": getattr(module, name)}}))


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_a_value_within_the_range_is_kept(name, value):
    assert holder(name)(x=value).x == value


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_value_out_of_the_range_is_refused(name, value):
    with pytest.raises(ValidationError, match="should be"):
        holder(name)(x=value)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "many", None, [1]])
def test_no_range_takes_what_is_not_a_finite_number(name, value):
    with pytest.raises(ValidationError, match="should be"):
        holder(name)(x=value)


def test_every_range_is_tested():
    annotated = {name for name, value in vars(module).items() if hasattr(value, "__metadata__")}
    assert annotated == {*RANGES, "Text", "FolderName"}


def test_a_folder_name_stays_in_its_folder():
    assert holder("FolderName")(x="reviews-2.b").x == "reviews-2.b"
    for wrong in ("", "..", "a/b", "../a", ".hidden", "a b"):
        with pytest.raises(ValidationError, match="should match pattern"):
            holder("FolderName")(x=wrong)


@pytest.mark.parametrize("value", ["", None, 3])
def test_a_text_has_letters(value):
    with pytest.raises(ValidationError, match=r"(String|Input) should"):
        holder("Text")(x=value)


@settings
class Example:
    """Three fields, one without a default."""

    name: Text
    size: Count = 3
    share: Fraction = 0.5


def test_every_bad_field_is_named_at_once_unknown_and_missing_ones_too():
    with pytest.raises(ValidationError) as caught:
        Example(size=0, share=math.nan, shape=1)
    fields = {str(detail["loc"][0]): detail["type"] for detail in caught.value.errors()}
    assert fields.keys() == {"name", "size", "share", "shape"}
    assert fields["shape"] == "unexpected_keyword_argument"
    assert fields["name"] == "missing"


def test_settings_are_frozen_keyword_only_dataclasses():
    example = Example(name="a", size="4")
    assert (example.size, example.share) == (4, 0.5)
    assert example == Example(name="a", size=4)
    assert dataclasses.replace(example, share=1).share == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.size = 5
    with pytest.raises(ValidationError, match="Unexpected positional argument"):
        Example("a")


def test_settings_that_inherit_keep_the_fields_and_the_checks():
    @settings
    class More(Example):
        rate: NonNegative = 0.0

    assert More(name="a", rate=2) == More(name="a", size=3, share=0.5, rate=2.0)
    with pytest.raises(ValidationError, match="2 validation errors"):
        More(name="a", rate=-1, size=0)

import dataclasses
import importlib.util
import operator
import sys
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from rlhf_exp import types
from rlhf_exp.types import (
    Completions,
    Experience,
    Generation,
    Layout,
    LossOutput,
    PromptBatch,
    Rollout,
    concatenate,
)

BATCH, PROMPT, COMPLETION, D_MODEL = 3, 2, 4, 5


def numbered(*shape: int, start: int) -> torch.Tensor:
    """start, start + 1, ...: no entry of a record equals another one of the same record."""
    size = torch.Size(shape).numel()
    return torch.arange(start, start + size, dtype=torch.float32).view(*shape)


def prompts(**changes: Any) -> PromptBatch:
    fields = {
        "tokens": torch.tensor([[0, 11], [12, 13], [0, 14]]),
        "mask": torch.tensor([[False, True], [True, True], [False, True]]),
        "rows": tuple({"prompt": text, "label": i} for i, text in enumerate(("A ", "B ", "C "))),
    }
    return PromptBatch(**(fields | changes))


def completions(**changes: Any) -> Completions:
    fields = {
        "prompts": prompts(),
        "tokens": torch.tensor([[21, 22, 23, 0], [24, 0, 0, 0], [25, 26, 27, 28]]),
        "mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool),
        "texts": ("one", "two", "three"),
    }
    return Completions(**(fields | changes))


def per_token(*names: str) -> dict[str, torch.Tensor]:
    return {name: numbered(BATCH, COMPLETION, start=100 * (i + 1)) for i, name in enumerate(names)}


def generation(**changes: Any) -> Generation:
    fields = {
        "completions": completions(),
        **per_token("logprobs", "values", "kept_mass"),
        "hidden": numbered(BATCH, COMPLETION, D_MODEL, start=1000),
    }
    return Generation(**(fields | changes))


def rollout(**changes: Any) -> Rollout:
    fields = {
        "completions": completions(),
        **per_token("logprobs", "ref_logprobs", "values", "kl", "entropy", "kept_mass"),
        "ref_hidden": numbered(BATCH, COMPLETION, D_MODEL, start=1000),
        "scores": numbered(BATCH, start=2000),
    }
    return Rollout(**(fields | changes))


def experience(**changes: Any) -> Experience:
    fields = {"rollout": rollout(), **per_token("rewards", "advantages", "returns")}
    return Experience(**(fields | changes))


def leaves(record: Any, path: str = "") -> dict[str, Any]:
    """Every tensor and tuple of a record and of those in it, by its path."""
    found = {}
    for field in dataclasses.fields(record):
        value, name = getattr(record, field.name), f"{path}{field.name}"
        nested = leaves(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
        found |= nested
    return found


@pytest.mark.parametrize("build", [prompts, completions, generation, rollout, experience])
@pytest.mark.parametrize(
    ("index", "rows"),
    [([2, 0], [2, 0]), ([1], [1]), ([0, 0, 2, 1], [0, 0, 2, 1]), ([-1], [2]), ([], [])],
)
def test_indexing_selects_rows_everywhere(build, index, rows):
    record = build()
    selected = record[torch.tensor(index, dtype=torch.long)]
    assert type(selected) is type(record)
    before, after = leaves(record), leaves(selected)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, tuple):
            assert after[name] == tuple(value[row] for row in rows), name
        elif value is None:  # of what a record may lack
            assert after[name] is None
        else:
            assert after[name].tolist() == [value.tolist()[row] for row in rows], name


def test_a_boolean_index_selects_the_same_rows_in_tensors_and_tuples():
    selected = completions()[torch.tensor([False, True, True])]
    assert selected.tokens.tolist() == [[24, 0, 0, 0], [25, 26, 27, 28]]
    assert selected.texts == ("two", "three")
    assert selected.prompts.texts == ("B ", "C ")


def test_indexing_leaves_the_record_alone():
    record = experience()
    record[torch.tensor([1])].rewards.zero_()
    assert torch.equal(record.rewards, numbered(BATCH, COMPLETION, start=100))


def test_texts():
    record = completions()
    assert record.prompts.texts == ("A ", "B ", "C ")
    assert record.full_texts == ("A one", "B two", "C three")
    assert record[torch.tensor([2, 1])].full_texts == ("C three", "B two")


def test_a_missing_text_is_not_passed_over():
    with pytest.raises(ValueError, match="shorter than"):
        _ = completions(texts=("one", "two")).full_texts


def test_sequences_join_prompts_and_completions():
    record = completions()
    tokens, mask = record.sequences
    assert record.prompt_len == PROMPT
    assert tokens.tolist() == [
        [0, 11, 21, 22, 23, 0],
        [12, 13, 24, 0, 0, 0],
        [0, 14, 25, 26, 27, 28],
    ]
    assert mask.int().tolist() == [[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert tokens[:, record.prompt_len :].tolist() == record.tokens.tolist()


SHORT = torch.zeros(BATCH, COMPLETION - 1)
NARROW = torch.zeros(BATCH - 1, COMPLETION)


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (prompts, {"mask": torch.ones(BATCH, PROMPT + 1, dtype=torch.bool)}),
        (prompts, {"mask": torch.ones(BATCH, PROMPT, dtype=torch.long)}),
        (prompts, {"tokens": torch.zeros(BATCH, PROMPT)}),
        (prompts, {"rows": [{"prompt": "A"}]}),
        (completions, {"tokens": torch.zeros(BATCH, COMPLETION + 1, dtype=torch.long)}),
        (completions, {"mask": torch.ones(BATCH - 1, COMPLETION, dtype=torch.bool)}),
        (completions, {"prompts": {}}),
        (generation, {"logprobs": SHORT}),
        (generation, {"values": NARROW}),
        (generation, {"kept_mass": SHORT}),
        (generation, {"hidden": torch.zeros(BATCH, COMPLETION)}),
        (generation, {"hidden": torch.zeros(BATCH, COMPLETION - 1, D_MODEL)}),
        (rollout, {"logprobs": SHORT}),
        (rollout, {"ref_logprobs": NARROW}),
        (rollout, {"ref_hidden": torch.zeros(BATCH, D_MODEL)}),
        (rollout, {"values": SHORT}),
        (rollout, {"kl": SHORT}),
        (rollout, {"entropy": SHORT}),
        (rollout, {"kept_mass": SHORT}),
        (rollout, {"scores": torch.zeros(BATCH, COMPLETION)}),
        (rollout, {"scores": torch.zeros(BATCH - 1)}),
        (experience, {"rewards": SHORT}),
        (experience, {"advantages": NARROW}),
        (experience, {"returns": torch.zeros(BATCH, COMPLETION, dtype=torch.long)}),
    ],
)
def test_a_field_of_another_shape_or_type_is_refused(build, changes):
    with pytest.raises(TypeCheckError, match=next(iter(changes))):
        build(**changes)


@pytest.mark.parametrize("build", [prompts, completions, generation, rollout, experience])
def test_records_are_joined_in_order(build):
    whole = build()
    parts = [whole[torch.tensor([0])], whole[torch.tensor([1, 2])]]
    turned = whole[torch.tensor([1, 2, 0])]
    for joined, expected in (
        (concatenate(parts), whole),
        (concatenate([whole]), whole),
        (concatenate(parts[::-1]), turned),
    ):
        assert type(joined) is type(whole)
        found, wanted = leaves(joined), leaves(expected)
        assert found.keys() == wanted.keys()
        for path, value in wanted.items():
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(found[path], value), path


def test_a_loss_is_a_scalar_with_scalar_metrics():
    output = LossOutput(loss=torch.tensor(1.5), metrics={"kl_exact": torch.tensor(0.25)})
    assert output.metrics["kl_exact"] == 0.25
    with pytest.raises(TypeCheckError, match="loss"):
        LossOutput(loss=torch.zeros(1), metrics={})
    with pytest.raises(TypeCheckError, match="metrics"):
        LossOutput(loss=torch.tensor(1.5), metrics={"kl_exact": torch.zeros(2)})


def test_records_are_checked_outside_the_tests_too(monkeypatch):
    # Under another name the module escapes the import hook that pytest sets, as it does in a run.
    spec = importlib.util.spec_from_file_location("types_as_in_a_run", types.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(TypeCheckError, match="mask"):
        module.PromptBatch(tokens=tokens, mask=torch.ones(2, 4, dtype=torch.bool), rows=({}, {}))
    with pytest.raises(TypeCheckError, match="loss"):
        module.LossOutput(loss=torch.zeros(1), metrics={})


@pytest.mark.parametrize("build", [prompts, completions, generation, rollout, experience])
def test_records_are_frozen(build):
    record = build()
    name = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError, match=name):
        setattr(record, name, getattr(record, name))


def test_records_are_complete_when_built():
    fields = {field.name: getattr(rollout(), field.name) for field in dataclasses.fields(Rollout)}
    del fields["scores"]
    with pytest.raises(TypeError, match="scores"):
        Rollout(**fields)
    with pytest.raises(TypeError, match="positional"):
        LossOutput(torch.tensor(1.5), {})


# Rows of 3, 1 and 4 tokens; by number, what `pick` takes of three rows of four columns.
REAL = [100, 101, 102, 104, 108, 109, 110, 111]


def test_a_layout_picks_real_tokens_row_by_row():
    layout = Layout.of(completions())
    per_token = numbered(BATCH, COMPLETION, start=100)
    assert layout.num_columns == 4
    assert layout.positions.tolist() == [0, 1, 2, 4, 8, 9, 10, 11]
    assert layout.pick(per_token).tolist() == REAL
    pairs = torch.stack([per_token, -per_token], dim=-1)
    assert layout.pick(pairs).tolist() == [[x, -x] for x in REAL]


def test_a_layout_ends_with_its_longest_row():
    layout = Layout.of(completions())[torch.tensor([1, 0])]
    assert layout.num_columns == 3
    assert layout.mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]
    assert layout.positions.tolist() == [0, 3, 4, 5]
    # Of tensors with all columns and of those with as many as it has.
    per_token = numbered(2, COMPLETION, start=100)
    for x in (per_token, per_token[:, :3]):
        assert layout.pick(x).tolist() == [100, 104, 105, 106]
    spread = layout.spread(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert spread.tolist() == [[1, 0, 0, 0], [2, 3, 4, 0]]
    pairs = layout.spread(torch.tensor([[1, 5], [2, 6], [3, 7], [4, 8]]))
    assert pairs.tolist() == [[[1, 5], [0, 0], [0, 0], [0, 0]], [[2, 6], [3, 7], [4, 8], [0, 0]]]


def test_a_layout_without_padding_takes_all():
    layout = Layout.of(completions())[torch.tensor([2, 2])]
    assert layout.positions is None
    per_token = numbered(2, COMPLETION, start=100)
    assert layout.pick(per_token).tolist() == [*range(100, 108)]
    assert torch.equal(layout.spread(layout.pick(per_token)), per_token)
    short = Layout.of(completions())[torch.tensor([1])]
    assert (short.num_columns, short.positions) == (1, None)
    assert short.spread(torch.tensor([7.0])).tolist() == [[7, 0, 0, 0]]


def test_a_whole_layout_keeps_its_shape():
    layout = Layout.of(completions(), whole=True)[torch.tensor([1, 0])]
    assert layout.num_columns == COMPLETION
    assert layout.positions.tolist() == [0, 4, 5, 6]
    per_token = numbered(2, COMPLETION, start=100)
    assert layout.pick(per_token).tolist() == [100, 104, 105, 106]
    assert torch.equal(layout.spread(layout.pick(per_token)), per_token * layout.mask)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 0], [2], [1], [1, 1, 0, 2, 1]])
def test_spreading_what_was_picked_leaves_padding_0(rows, whole):
    index = torch.tensor(rows)
    mask = completions().mask
    layout = Layout.of(completions(), whole=whole)[index]
    # A layout of these rows from the start is the same.
    again = Layout.of(completions()[index], whole=whole)
    assert (again.num_columns, again.whole) == (layout.num_columns, whole)
    assert torch.equal(again.mask, layout.mask)
    x = numbered(len(rows), COMPLETION, D_MODEL, start=1).requires_grad_()
    spread = layout.spread(layout.pick(x))
    assert torch.equal(spread, x * mask[index][..., None])
    (gradient,) = torch.autograd.grad(spread.square().sum() / 2, x)
    assert torch.equal(gradient, spread)


SAME = torch.tensor([[7, 8]] * BATCH)
REAL_PROMPTS = torch.ones(BATCH, PROMPT, dtype=torch.bool)
PADDED_ALIKE = torch.tensor([[False, True]] * BATCH)
PADDED_APART = torch.tensor([[True, True], [True, True], [False, True]])


@pytest.mark.parametrize(
    ("tokens", "mask", "one_prompt", "padded"),
    [
        (SAME, REAL_PROMPTS, True, False),
        (SAME, PADDED_ALIKE, True, True),
        (SAME, PADDED_APART, False, True),
        (SAME + torch.tensor([[0, 0], [0, 1], [0, 0]]), REAL_PROMPTS, False, False),
        (SAME + torch.tensor([[0, 0], [0, 0], [1, 0]]), PADDED_ALIKE, False, True),
    ],
)
def test_a_layout_knows_what_prompts_have_in_common(tokens, mask, one_prompt, padded):
    layout = Layout.of(completions(prompts=prompts(tokens=tokens, mask=mask)))
    assert (layout.one_prompt, layout.padded_prompts) == (one_prompt, padded)
    rows = layout[torch.tensor([2, 0])]
    assert (rows.one_prompt, rows.padded_prompts) == (one_prompt, padded)
    assert rows.device == torch.device("cpu")

"""Changes made by hand are found: in the head, the matrix and the directions that were changed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BioGptConfig, BioGptForCausalLM

from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.inside.loading import Pair
from rlhf_exp.inside.overlap import Kept, changed_entries, measure, overlap
from rlhf_exp.inside.weights import differences, draw
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.settings import ConfigError
from tests.builders import ARCHITECTURES, build_tokenizer, sliding_policy, tiny_policy


def pair_of(policy: TransformerWithValueHead) -> tuple[Pair, PreTrainedModel]:
    """The policy and a copy of it, and the copy's language model, to be changed."""
    tuned = copy.deepcopy(policy)
    tuned.language_model.requires_grad_(False)
    return Pair(base=policy, tuned=tuned), tuned.language_model


def by_name(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in record["weights"]}


def test_equal_models_do_not_differ() -> None:
    record = differences(pair_of(tiny_policy())[0], seed=0)
    assert record["whole"]["change_norm"] == record["whole"]["changed_bf16"] == 0
    assert record["whole"]["changed"] == [0] * 7
    assert all(row.get("effective_rank") is None for row in record["weights"])
    assert all(row["all"] == 0 for row in record["heads"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_that_was_changed_is_found(architecture: str) -> None:
    policy = tiny_policy(architecture)
    pair, _ = pair_of(policy)
    bridge = pair.tuned.hooked()
    # The second block's first head: its slice of what maps heads to the residual stream.
    output = {
        "gpt2": "transformer.h.1.attn.c_proj.weight",
        "llama": "model.layers.1.self_attn.o_proj.weight",
        "qwen2": "model.layers.1.self_attn.o_proj.weight",
        "gpt_neox": "gpt_neox.layers.1.attention.dense.weight",
    }[architecture]
    matrix = pair.tuned.language_model.get_parameter(output)
    half = matrix[:8] if architecture == "gpt2" else matrix[:, :8]  # width 16, two heads
    half.mul_(1.5)
    assert bridge.W_O.shape == (2, 2, 8, 16)
    record = differences(pair, seed=0)
    changed = [row for row in record["heads"] if row["all"] > 0]
    assert [(row["layer"], row["head"]) for row in changed] == [(1, 0)]
    [row] = changed
    assert row["W_O"] == pytest.approx(0.5, rel=1e-4)
    assert row["W_Q"] == row["W_K"] == row["W_V"] == 0
    assert [r["name"] for r in record["weights"] if r["change_norm"]] == [output]
    assert [r["layer"] for r in record["layers"] if r["change_norm"]] == [1]
    assert by_name(record)[output]["changed"][0] == pytest.approx(0.5)


def test_keys_of_grouped_heads_count_for_each_head_of_the_group() -> None:
    pair, model = pair_of(sliding_policy())  # two query heads, one of keys and values
    model.get_parameter("model.layers.0.self_attn.k_proj.weight").mul_(1.25)
    rows = [row for row in differences(pair, seed=0)["heads"] if row["layer"] == 0]
    assert len(rows) == 2
    assert [row["W_K"] for row in rows] == pytest.approx([0.25, 0.25], rel=1e-4)


def test_a_change_of_rank_one_has_effective_rank_one() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    pair, model = pair_of(tiny_policy("llama"))
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(64, generator=generator), torch.randn(16, generator=generator)
    model.get_parameter(name).add_(torch.outer(u, v))
    row = by_name(differences(pair, seed=0))[name]
    assert row["shape"] == [64, 16]
    assert row["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert row["energy"]["1"] == pytest.approx(1, abs=1e-5)
    assert 13 < row["random"]["effective_rank"] < 16
    assert row["random"]["energy"]["1"] < 0.2
    assert row["relative_norm"] > 0


def test_a_matrix_that_grew_is_aligned_with_itself() -> None:
    name = "transformer.h.0.mlp.c_fc.weight"  # stored as inputs by outputs
    pair, model = pair_of(tiny_policy())
    base = pair.base.language_model.get_parameter(name).detach()
    u, s, v = torch.linalg.svd(base, full_matrices=False)
    model.get_parameter(name).add_(0.1 * s[0] * torch.outer(u[:, 0], v[0]))
    row = by_name(differences(pair, seed=0))[name]
    assert row["shape"] == [64, 16]  # as nn.Linear has it
    assert row["alignment"]["directions"] == 4
    assert row["alignment"]["rows"] == pytest.approx(1, abs=1e-4)
    assert row["alignment"]["columns"] == pytest.approx(1, abs=1e-4)
    assert row["alignment"]["chance"] == {"rows": 4 / 64, "columns": 4 / 16}


def test_shares_by_tolerance_and_at_bf16_by_hand() -> None:
    name = "model.norm.weight"
    pair, model = pair_of(tiny_policy("llama"))
    weight, base = model.get_parameter(name), pair.base.language_model.get_parameter(name)
    base.requires_grad_(False).fill_(1.0)
    weight.fill_(1.0)
    weight[:4] += 5e-4  # below half of bf16's step of 2^-7 at 1
    weight[4:6] += 5e-2
    row = by_name(differences(pair, seed=0))[name]
    assert row["changed"] == [6 / 16] * 6 + [2 / 16]
    assert row["changed_bf16"] == 2 / 16
    assert row["relative_norm"] == pytest.approx((4 * 5e-4**2 + 2 * 5e-2**2) ** 0.5 / 4, rel=1e-3)


def test_an_architecture_without_heads_gets_all_but_heads(tmp_path: Path) -> None:
    config = BioGptConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    pair, _ = pair_of(TransformerWithValueHead(BioGptForCausalLM(config), build_tokenizer()))
    record = differences(pair, seed=0)
    assert record["heads"] is None
    assert "TransformerLens cannot open BioGptForCausalLM" in record["missing"]["heads"]
    assert len(record["weights"]) > 10
    [path] = draw(record, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def randomly_changed(policy: TransformerWithValueHead, seed: int, share: float) -> Pair:
    pair, model = pair_of(policy)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        hit = torch.rand(parameter.shape, generator=generator) < share
        parameter.add_(hit * torch.rand(parameter.shape, generator=generator))
    return pair


def test_the_overlap_of_random_changes_is_chance() -> None:
    policy = tiny_policy()
    one, other = (changed_entries(randomly_changed(policy, s, 0.3)) for s in (0, 1))
    for criterion, chance in (("bf16", 0.3), ("largest", 0.05)):
        found = overlap(one[criterion], other[criterion])
        assert found["chance"] == pytest.approx(chance, rel=0.2)
        assert found["shared"] == pytest.approx(found["chance"], rel=0.25)


def test_equal_changes_overlap_wholly_and_no_changes_not_at_all() -> None:
    policy = tiny_policy()
    one = changed_entries(randomly_changed(policy, 0, 0.3))
    assert overlap(one["bf16"], one["bf16"])["shared"] == 1
    none = changed_entries(pair_of(policy)[0])
    assert overlap(one["largest"], none["largest"]) == {"shared": None, "chance": None}


def test_runs_are_compared_two_by_two_if_they_began_alike() -> None:
    policy = tiny_policy()
    runs = [
        Kept(name, "same", changed_entries(randomly_changed(policy, seed, 0.3)))
        for seed, name in enumerate("abc")
    ]
    record = measure(runs)
    assert [pair["runs"] for pair in record["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    with pytest.raises(ConfigError, match="began with different weights"):
        measure([*runs, runs[0]._replace(base_sha256="another")])

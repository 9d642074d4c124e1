"""The model card: what it says, and that others can read it."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from rlhf_exp.tracking.model_card import write_model_card

CONFIG: dict[str, Any] = {
    "name": "mine",
    "seed": 3,
    "stage": {"_target_": "rlhf_exp.stages.ppo.PPO", "kl_coef": 0.25},
    "task": {"_target_": "rlhf_exp.tasks.prefix.Prefix", "prefix": "This | is", "file": None},
    "model": {"base_model": "me/some-model"},
    "logger": {"entity": "somebody"},
    "reward": None,
}
RESULT: dict[str, Any] = {
    "before": {"eval/score": 0.1234567, "eval/kl": 0.0},
    "after": {"eval/score": 0.75, "eval/kl": 0.05, "eval/exact_match": 0.5},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    lines = ["commit abc+", "python 3.11 on Linux", "gpu none", "torch==2.13.0", "rich==15.0.0"]
    (tmp_path / "environment.txt").write_text("\n".join(lines))
    return tmp_path


def test_it_holds_evaluation_data_configuration_and_versions(run: Path) -> None:
    card = ModelCard.load(write_model_card(run, CONFIG, RESULT))
    text = card.content
    assert "# mine" in text
    assert "`stage=ppo`, seed 3, from `me/some-model`." in text
    assert "| `eval/score` | 0.1235 | 0.75 |" in text
    assert "| `eval/exact_match` |  | 0.5 |" in text
    assert "## Data\n\n- `prefix`: This | is\n\n## Conf" in text
    shown = json.loads(text.partition("```json\n")[2].partition("```")[0])
    assert shown == {name: CONFIG[name] for name in ("name", "seed", "stage", "task", "model")}
    versions = text.partition("## Versions")[2]
    assert "commit abc+" in versions
    assert "torch==2.13.0" in versions
    assert "rich" not in versions
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["rlhf_exp", "ppo"]
    assert card.data.base_model == "me/some-model"
    for absent in ("## Curves", "## Files", "somebody"):
        assert absent not in text


def test_curves_are_copied_and_files_explained_where_there_are_any(run: Path) -> None:
    (run / "curves.png").write_bytes(b"png")
    (run / "model" / "value_head.safetensors").touch()
    text = write_model_card(run, CONFIG, RESULT).read_text()
    assert "![metrics by phase](curves.png)" in text
    assert (run / "model" / "curves.png").read_bytes() == b"png"
    assert "`value_head.safetensors` is the value head" in text
    assert "adapter" not in text
    (run / "model" / "adapter").mkdir()
    assert (
        "`adapter/` holds the adapters alone" in write_model_card(run, CONFIG, RESULT).read_text()
    )


def test_an_intervention_is_named_with_what_it_means_for_the_weights(run: Path) -> None:
    none = {"_target_": "rlhf_exp.models.interventions.NoIntervention"}
    text = write_model_card(run, {**CONFIG, "intervention": none}, RESULT).read_text()
    assert "## Intervention" not in text
    intervention = {"_target_": "rlhf_exp.models.interventions.Ablate", "mlps": [1]}
    text = write_model_card(run, {**CONFIG, "intervention": intervention}, RESULT).read_text()
    assert "under this intervention; the saved weights are without it.\n\n- `mlps`: [1]\n" in text


def test_a_short_name_is_told_to_others_as_the_hub_names_it(run: Path) -> None:
    config = {**CONFIG, "model": {"base_model": "tiny"}}
    card = ModelCard.load(write_model_card(run, config, RESULT, hub_name=lambda name: f"me/{name}"))
    assert card.data.base_model == "me/tiny"
    assert "from `tiny`." in card.content


def test_a_directory_of_this_machine_is_no_base_model_for_others(run: Path) -> None:
    config = {**CONFIG, "model": {"base_model": str(run)}}
    card = ModelCard.load(write_model_card(run, config, RESULT))
    assert card.data.base_model is None
    assert f"from `{run}`." in card.content
    nothing = write_model_card(run, {**CONFIG, "model": {}}, {"after": {"heldout/loss": 2.0}})
    assert "from nothing." in nothing.read_text()
    assert "Fresh samples" not in nothing.read_text()
    assert "| `heldout/loss` |  | 2 |" in nothing.read_text()

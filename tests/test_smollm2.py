"""The run of `make smollm2` on the real model, cut to one small phase."""

import json
from pathlib import Path

import pytest

from rlhf_exp.models.fetching import fetch_model
from rlhf_exp.models.known import KNOWN, MODELS
from rlhf_exp.models.loading import load_language_model
from tests.app.test_run import run_folder, train

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.soak
def test_a_phase_of_the_run_on_the_real_model(tmp_path: Path) -> None:
    fetch_model(KNOWN["smollm2"], ROOT / MODELS)  # where make smollm2 puts it, so once for both
    (tmp_path / MODELS).parent.mkdir(parents=True)
    (tmp_path / MODELS).symlink_to(ROOT / MODELS)
    outcome = train(
        tmp_path, "experiment=smollm2_sentiment", "logger=local", "stage.total_phases=1",
        "stage.batch_size=8", "stage.compute.micro_batch_size=8", "stage.eval_samples=32",
        "schedule.warmup_steps=0",
    )  # fmt: skip
    assert outcome.code == 0, outcome.out + outcome.err
    folder = run_folder(tmp_path)
    result = json.loads((folder / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert before["eval/kl"] < 1e-3 < after["eval/kl"]
    # The model writes text, and its copy calls neither all of it positive nor none.
    assert before["eval/distinct_3"] > 0.9
    assert 0.4 < before["eval/score"] < 0.75
    model, tokenizer = load_language_model(str(folder))
    assert 134e6 < sum(weight.numel() for weight in model.parameters()) < 136e6
    assert tokenizer.chat_template

"""PPO whose reward is its own frozen reference as a judge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.models.finetune import Full, Lora
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.rewards.judge import Judge
from rlhf_exp.rl.setup import load_setup
from tests.builders import completions
from tests.rewards.test_judge import FEW_SHOT, save_judge
from tests.rl.toy import ToyTask, context, parts, ppo_with

TASK = ToyTask(prompts=("this movie was", "this film"), prepend_bos=False)


def judged_parts(path: str, finetune: Any, judge: Judge) -> Any:
    return parts(task=TASK, model=Pretrained(base_model=path), finetune=finetune, reward=judge)


@pytest.mark.parametrize("finetune", [Full(), Lora(rank=2, alpha=4)], ids=["full", "lora"])
def test_the_last_samples_have_the_scores_of_the_base_model(finetune: Any, tmp_path: Path) -> None:
    path = save_judge(tmp_path / "judge")
    ppo = ppo_with(
        total_phases=3, batch_size=8, num_minibatches=2, eval_samples=8, dtype="fp32",
        checkpoint_every=None,
    )  # fmt: skip
    ppo.run(context(tmp_path / "run"), judged_parts(path, finetune, Judge(**FEW_SHOT)))
    lines = (tmp_path / "run/samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["phase"] == 3]
    assert len({row["score"] for row in rows}) > 1
    record = completions(
        [row["completion"] for row in rows], before=[row["prompt"] for row in rows]
    )
    judge = Judge(**{**FEW_SHOT, "name": path}).load(torch.device("cpu"))
    recorded = torch.tensor([row["score"] for row in rows])
    torch.testing.assert_close(recorded, judge(record), rtol=0, atol=1e-5)


def test_a_setup_knows_whether_its_reference_scores(tmp_path: Path) -> None:
    path = save_judge(tmp_path / "judge")
    for name, by_reference in (("policy", True), (path, False)):
        p = judged_parts(path, Full(), Judge(**{**FEW_SHOT, "name": name}))
        setup = load_setup(context(tmp_path), p.task, p.model, p.reward, p.sampler, p.finetune)
        assert setup.scored_by_reference == by_reference

"""The limit of a run: what is sampled, where it is kept, and what it says of an evaluation."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_exp.functional.optimal_frontier import optimal_kl
from rlhf_exp.rl.limit import METRICS, Limit, read_limit
from rlhf_exp.rollout.cached import CachedSampler

from ..stages.test_resume import Failing, assert_resume_is_exact
from .toy import RAGGED, Echoed, EchoTask, context, parts, ppo_with, rows

PPO = ppo_with(
    total_phases=2, batch_size=8, eval_every=1, eval_samples=6, checkpoint_every=1,
    limit_samples=24, normalize_reward=False,
)  # fmt: skip


def test_an_evaluation_has_the_least_kl_of_its_score(tmp_path: Path) -> None:
    ppo = replace(PPO, eval_samples=256)
    result = ppo.run(context(tmp_path), parts(task=RAGGED, reward=Failing()))
    content = json.loads((tmp_path / "limit.json").read_text())
    scores = torch.tensor(content["scores"])
    assert scores.shape == (4, 24)  # of the four prompts
    first, *later = [row for row in rows(tmp_path) if "eval/score" in row]
    assert first["eval/score"] == pytest.approx(scores.mean().item(), abs=0.3)
    assert "eval/kl_efficiency" not in first  # there is no KL yet
    for row in later:
        assert row["eval/kl_optimal"] == optimal_kl(scores, row["eval/score"]) > 0
        share = row["eval/kl_optimal"] / row["eval/kl_sum"]
        assert row["eval/kl_efficiency"] == pytest.approx(share)
        assert 0 < share < 1
    assert {*result.after} == {*ppo.metric_names(parts(task=RAGGED))}


def test_a_run_without_it_has_the_same_numbers_otherwise(tmp_path: Path) -> None:
    for name, ppo in (("with", PPO), ("without", replace(PPO, limit_samples=None))):
        ppo.run(context(tmp_path / name), parts(task=RAGGED))
    with_limit, without = (rows(tmp_path / name) for name in ("with", "without"))
    for row, other in zip(with_limit, without, strict=True):
        assert {k: v for k, v in row.items() if k not in METRICS and "time/" not in k} == {
            k: v for k, v in other.items() if "time/" not in k
        }
    assert not (tmp_path / "without" / "limit.json").exists()


@pytest.mark.usefixtures("unchecked")
def test_it_is_measured_once(tmp_path: Path) -> None:
    assert_resume_is_exact(tmp_path, PPO, at=4)
    limits = [(tmp_path / name / "limit.json").read_bytes() for name in ("cut", "whole")]
    assert limits[0] == limits[1]


def test_true_rewards_are_kept_beside_the_scores(tmp_path: Path) -> None:
    sampler = CachedSampler(gen_len=3, stop_at_eos=True)
    PPO.run(context(tmp_path), parts(task=EchoTask(), reward=Echoed(), sampler=sampler))
    limit = read_limit(tmp_path)
    assert limit is not None
    assert limit.scores.shape == (6, 24)  # an evaluation takes six of the 24 prompts
    assert torch.equal(limit.scores, limit.true_rewards)


def test_what_the_samples_do_not_tell_is_absent() -> None:
    limit = Limit(scores=torch.tensor([[0.0, 1.0] * 8]), true_rewards=None)
    assert limit.metrics({"eval/score": 0.9, "eval/kl_sum": 1.0}) == {}  # few samples would do
    kl = optimal_kl(limit.scores, 0.6)
    assert limit.metrics({"eval/score": 0.6, "eval/kl_sum": 0.5}) == {
        "eval/kl_optimal": kl, "eval/kl_efficiency": 2 * kl,
    }  # fmt: skip
    assert limit.metrics({"eval/score": 0.6, "eval/kl_sum": 1e-4}) == {"eval/kl_optimal": kl}


@pytest.mark.parametrize("content", ["", "{}", '{"scores": [[1], [1, 2]]}', '{"scores": "a"}'])
def test_a_damaged_file_is_left_out(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "limit.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert read_limit(tmp_path) is None
    assert "limit.json cannot be read (it is not what a run writes)" in caplog.text
    assert read_limit(tmp_path / "none") is None

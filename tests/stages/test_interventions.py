"""PPO under an intervention: both engines learn alike, and a run keeps its files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlhf_exp.models.editing import Edits
from rlhf_exp.models.engines import ENGINES
from rlhf_exp.models.finetune import Full, LastLayers, Lora
from rlhf_exp.models.loading import Pretrained, load_policy
from rlhf_exp.rewards.attempts import CheckedReward
from rlhf_exp.rl.evaluation import evaluate
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.settings import ConfigError
from rlhf_exp.training.optim import AdamWSettings
from tests.builders import ARCHITECTURES, assert_near
from tests.edited import settings
from tests.rl.toy import RAGGED, context, parts, phase, ppo_with, rows, saved_model, start

SMALL = ppo_with(batch_size=8, num_minibatches=2, total_phases=2, eval_every=1, eval_samples=8,
                 histograms_every=None, dtype="fp32")  # fmt: skip
SMOOTH = AdamWSettings(base_lr=1e-2, head_lr=1e-2, eps=1e-3)
KINDS = {"full": Full(), "last_layers": LastLayers(num_layers_unfrozen=1),
         "lora": Lora(rank=4, alpha=8)}  # fmt: skip


def given(path: Path, architecture: str, **replaced: Any) -> dict[str, Any]:
    model = saved_model(path / "base", architecture=architecture)
    sampler = CachedSampler(gen_len=4, stop_at_eos=True)
    return {"task": RAGGED, "model": model, "sampler": sampler, "optimizer": SMOOTH, **replaced}


@pytest.mark.parametrize(("case", "positions"), [("add", "prompt"), ("mean direction", "all")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_engines_and_samplers_learn_alike(
    architecture: str, case: str, positions: str, tmp_path: Path
) -> None:
    learned = []
    for engine, sampler in (("fast", CachedSampler), ("hooked", BridgeSampler)):
        shape = given(tmp_path, architecture, sampler=sampler(gen_len=4, top_k=1))
        setup, state = start(SMALL, tmp_path / engine, **shape)
        setup.policy.engine = ENGINES[engine](setup.policy)
        settings(case, tmp_path, positions=positions).attach(setup.policy)
        before = [p.detach().clone() for p in setup.policy.parameters()]
        metrics = phase(SMALL, setup, state)
        learned.append(([p.detach() for p in setup.policy.parameters()], metrics))
    (fast, fast_metrics), (hooked, hooked_metrics) = learned
    for one, other in zip(fast, hooked, strict=True):
        assert_near(one, other, tolerance=1e-4)
    assert max((a - b).abs().max() for a, b in zip(before, fast, strict=True)) > 1e-3
    for name in ("objective/kl", "loss/total", "loss/kl", "policy/approxkl"):
        assert fast_metrics[name] == pytest.approx(hooked_metrics[name], rel=1e-3, abs=1e-5)
    assert fast_metrics["objective/kl"] > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_under_an_intervention(kind: str, tmp_path: Path) -> None:
    shape = given(tmp_path, "llama", finetune=KINDS[kind])
    intervention = settings("add", tmp_path)
    assert SMALL.check(parts(**shape, intervention=intervention)) == []
    SMALL.run(context(tmp_path / "plain"), parts(**shape))
    SMALL.run(context(tmp_path / "edited"), parts(**shape, intervention=intervention))
    plain, edited = rows(tmp_path / "plain")[0], rows(tmp_path / "edited")[0]
    assert abs(plain["eval/kl"]) < 1e-6
    assert edited["eval/kl"] > 0.01
    # A saved model is without it: attached again, it computes what the run's last policy did.
    policy = load_policy(tmp_path / "edited")
    tokens = torch.tensor([[1, 4, 5, 6]])
    before = policy(tokens)[0]
    intervention.attach(policy)
    assert (policy(tokens)[0] - before).abs().max() > 0.1
    saved = Pretrained(base_model=str(tmp_path / "edited"))
    setup, _ = start(SMALL, tmp_path / "saved", **{**shape, "model": saved, "finetune": Full()})
    intervention.attach(setup.policy)
    reward = CheckedReward(setup.score)
    again = evaluate(setup, reward, num_samples=8, seed=context(tmp_path / "x").seed, phase=2)
    last = [row for row in rows(tmp_path / "edited", "samples.jsonl") if row["phase"] == 2]
    texts = [row["completion"] for row in last]
    assert [row["completion"] for row in again.samples] == texts
    setup.policy.edits = Edits()
    plain = evaluate(setup, reward, num_samples=8, seed=context(tmp_path / "x").seed, phase=2)
    assert [row["completion"] for row in plain.samples] != texts


def test_a_run_is_not_resumed_with_another_file(tmp_path: Path) -> None:
    taken = parts(**given(tmp_path, "gpt2"), intervention=settings("add", tmp_path))
    SMALL.run(context(tmp_path / "run"), taken)
    save_file({"vector": torch.ones(16)}, tmp_path / "vectors.safetensors")
    with pytest.raises(ConfigError, match="intervention: the files that it names have changed"):
        SMALL.run(context(tmp_path / "run", resume=True), taken)


def test_a_missing_file_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    intervention = settings("add", tmp_path, path="nowhere.safetensors")
    with pytest.raises(ConfigError, match=r"intervention\.path=nowhere\.safetensors: there is no"):
        SMALL.check(parts(intervention=intervention))

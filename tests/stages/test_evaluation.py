"""Evaluation: fresh samples from the full distribution, paired between calls."""

import math
from pathlib import Path

import pytest
import torch

from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.stages.evaluation import Evaluation, evaluate
from rlhf_exp.stages.ppo import PPO, Actors

from .toy import RAGGED, start


def run(actors: Actors, *, num_samples: int = 6, seed: int = 1) -> Evaluation:
    return evaluate(
        actors.policy,
        actors.reference,
        actors.score,
        actors.sampler,
        actors.eval_prompts,
        num_samples=num_samples,
        seed=seed,
        phase=0,
    )


def test_metrics_by_hand(tmp_path: Path) -> None:
    sampler = CachedSampler(gen_len=5, stop_at_eos=True)
    actors, _ = start(PPO(), tmp_path, task=RAGGED, sampler=sampler)
    with torch.no_grad():
        for p in actors.policy.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    result = run(actors, num_samples=400)
    tokenizer = actors.policy.tokenizer
    kls: list[float] = []
    entropies: list[float] = []
    for sample in result.samples:
        prompt = [1, *tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]]
        words = tokenizer(sample["completion"], add_special_tokens=False)["input_ids"]
        # The text does not show special tokens; recover the sequence only where it has none.
        if len(words) < 5:
            continue
        ids = torch.tensor([prompt + words])
        with torch.no_grad():
            p = actors.policy(ids)[0][0].double().log_softmax(-1)
            q = (
                actors.reference.unembed(
                    actors.reference.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))
                )[0]
                .double()
                .log_softmax(-1)
            )
        first = len(prompt) - 1
        kl = [(p[i].exp() * (p[i] - q[i])).sum().item() for i in range(first, first + 5)]
        assert sample["kl_sum"] == pytest.approx(sum(kl), abs=1e-4)
        assert sample["score"] == float("w7" in (sample["prompt"] + sample["completion"]).split())
        kls += kl
        entropies += [-(p[i].exp() * p[i]).sum().item() for i in range(first, first + 5)]
    assert len(kls) > 100
    lengths = result.metrics["eval/len_mean"]
    assert result.metrics["eval/kl"] == pytest.approx(
        result.metrics["eval/kl_sum"] / lengths, rel=1e-4
    )
    assert lengths < 4.9
    # Rows with special tokens are left out here, so these two agree only roughly.
    assert result.metrics["eval/kl"] == pytest.approx(sum(kls) / len(kls), rel=0.2)
    assert result.metrics["eval/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=0.2)
    assert result.metrics["eval/kl_sum"] == pytest.approx(
        math.fsum(s["kl_sum"] for s in result.samples) / 400, rel=1e-5
    )
    assert result.metrics["eval/score"] == pytest.approx(
        sum(s["score"] for s in result.samples) / 400, abs=1e-6
    )
    assert 0 < result.metrics["eval/distinct_3"] <= 1


def test_the_same_seed_gives_the_same_samples_whatever_was_sampled_before(tmp_path: Path) -> None:
    actors, state = start(PPO(), tmp_path, task=RAGGED)
    first = run(actors)
    actors.sampler(actors.policy, actors.train_prompts, state.sample_generator)
    torch.rand(3)
    assert run(actors).samples == first.samples
    assert run(actors, seed=2).samples != first.samples


def test_prompts_are_repeated_evenly(tmp_path: Path) -> None:
    actors, _ = start(PPO(), tmp_path, task=RAGGED)
    prompts = [s["prompt"] for s in run(actors, num_samples=10).samples]
    counts = sorted(prompts.count(p) for p in RAGGED.prompts)
    assert counts == [2, 2, 3, 3]


def test_filters_and_temperature_of_the_sampler_are_left_out(tmp_path: Path) -> None:
    greedy = CachedSampler(gen_len=5, top_k=1, temperature=0.5)
    a, _ = start(PPO(), tmp_path, sampler=greedy)
    b, _ = start(PPO(), tmp_path, sampler=CachedSampler(gen_len=5))
    assert run(a).samples == run(b).samples
    assert len({s["completion"] for s in run(a).samples}) > 1


def test_an_untouched_policy_has_no_kl(tmp_path: Path) -> None:
    actors, _ = start(PPO(), tmp_path)
    assert abs(run(actors).metrics["eval/kl"]) < 1e-6

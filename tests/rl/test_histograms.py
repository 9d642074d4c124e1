"""The histograms of a phase: of the right numbers, at the right phases, at no cost to the rest."""

import math
from pathlib import Path

import pytest
import torch

from rlhf_exp.rl.histograms import HistogramCollector
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.summary import histogram
from rlhf_exp.training.optim import AdamWSettings

from .fixed import LENGTHS, fixed_completions, fixed_experience
from .toy import RAGGED, collect, context, learn, parts, ppo_with, rows, start, textbook_pass

SMALL = ppo_with(batch_size=8, num_minibatches=2, batches_per_learning_phase=2, dtype="fp32")


def watching() -> HistogramCollector:
    """A collector that notes the phase to come."""
    histograms = HistogramCollector()
    histograms.start(active=True)
    return histograms


STILL = AdamWSettings(base_lr=1e-30, head_lr=1e-30)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_last_pass_is_seen_whole_and_once(tmp_path: Path, micro_batch_size: int | None) -> None:
    ppo = ppo_with(
        batch_size=8, num_minibatches=2, batches_per_learning_phase=3, dtype="fp32",
        micro_batch_size=micro_batch_size,
    )  # fmt: skip
    setup, state = start(ppo, tmp_path, task=RAGGED, optimizer=STILL)
    experience = fixed_experience(ppo, setup, fixed_completions(setup))
    seen, real = watching(), experience.rollout.completions.mask
    list(learn(ppo, setup, state, experience, seen))
    found = seen.histograms()
    assert found.keys() == {"advantages", "ratio", "token_kl"}
    assert found["advantages"] == histogram(experience.advantages[real])
    assert found["token_kl"] == histogram(experience.rollout.kl[real])

    # The policy stands still, so that its ratios are the same at every update.
    new = textbook_pass(setup.policy, setup.reference, experience.rollout, temperature=1.0)
    ratios = (new.logprobs - experience.rollout.logprobs)[real].exp().tolist()
    ratio = found["ratio"]
    assert sum(ratio.counts) == sum(LENGTHS)
    assert (ratio.edges[0], ratio.edges[-1]) == pytest.approx((min(ratios), max(ratios)), abs=1e-5)
    assert max(ratios) - min(ratios) > 0.01
    width = ratio.edges[1] - ratio.edges[0]
    middle = sum(n * (a + width / 2) for n, a in zip(ratio.counts, ratio.edges, strict=False))
    assert middle / sum(LENGTHS) == pytest.approx(sum(ratios) / len(ratios), abs=width / 2)


def test_ratios_are_those_of_the_last_pass(tmp_path: Path) -> None:
    found = {}
    for passes in (1, 2):
        ppo = ppo_with(SMALL, num_minibatches=1, batches_per_learning_phase=passes)
        setup, state = start(ppo, tmp_path)
        seen = watching()
        experience = collect(ppo, setup, state)
        list(learn(ppo, setup, state, experience, seen))
        found[passes] = seen.histograms()["ratio"]
    assert (found[1].edges[0], found[1].edges[-1]) == pytest.approx((1, 1), abs=1e-4)
    assert found[2].edges[-1] - found[2].edges[0] > 1e-3


def test_learning_is_the_same_bit_by_bit_whether_it_is_seen_or_not(tmp_path: Path) -> None:
    weights = []
    for seen in (None, watching()):
        setup, state = start(SMALL, tmp_path, task=RAGGED)
        experience = collect(SMALL, setup, state)
        list(learn(SMALL, setup, state, experience, seen))
        weights.append([p.detach() for p in setup.policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(("every", "phases"), [(2, [2, 4, 5]), (None, [])])
def test_a_run_has_them_every_so_many_phases_and_at_its_end(
    tmp_path: Path, every: int | None, phases: list[int]
) -> None:
    ppo = ppo_with(
        total_phases=5, batch_size=8, eval_every=5, eval_samples=8, histograms_every=every
    )
    ppo.run(context(tmp_path), parts(sampler=CachedSampler(gen_len=3)))
    if not phases:
        assert not (tmp_path / "histograms.jsonl").exists()
        return
    written = rows(tmp_path, "histograms.jsonl")
    names = ("advantages", "ratio", "token_kl")
    assert [(row["phase"], row["name"]) for row in written] == [
        (phase, name) for phase in phases for name in names
    ]
    for row in written:
        assert sum(row["counts"]) == 8 * 3
        assert len(row["edges"]) == len(row["counts"]) + 1
        assert row["edges"] == sorted(row["edges"])
        assert all(map(math.isfinite, row["edges"]))

"""The presets beside PPO: each learns, begins at ratio 1, ignores padding and resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from rlhf_exp.app.run import ALLOWED_TARGETS, instantiate, to_container
from rlhf_exp.functional.logprobs import completion_logits, kl_estimate
from rlhf_exp.functional.masking import masked_mean, sequence_mean
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.rl.estimators import BestOfGroup, GroupNormalized, LeaveOneOut, Reinforce, credit
from rlhf_exp.rl.learn import Minibatch, minibatches
from rlhf_exp.rl.phases import Phases
from rlhf_exp.rollout.cached import CachedSampler, prefill
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.types import Experience, Layout, Rollout
from tests.composed import compose

from ..stages.test_resume import assert_resume_is_exact
from .fixed import fixed_completions, fixed_experience, off_the_reference
from .toy import RAGGED, collect, context, learn, loss, parts, phase, ppo_with, rows, start

PRESETS = ("ppo", "rloo", "grpo", "dr_grpo", "dapo", "reinforce", "raft")
SMALL = {"eval_samples": 8, "eval_every": 99, "checkpoint_every": None, "histograms_every": None}


def preset(name: str, **options: Any) -> PPO:
    """The stage of a preset, with some settings changed."""
    config = to_container(compose(f"stage={name}"))["stage"]
    problems: list[str] = []
    stage = instantiate(config, "stage", problems, allowed=ALLOWED_TARGETS)
    assert not problems
    return ppo_with(stage, **{**SMALL, **options})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", PRESETS)
def test_each_learns_the_bandit(name: str, tmp_path: Path) -> None:
    one_step = name in ("reinforce", "raft")  # a phase, where the others take eight
    phases = 60 if one_step else 12
    ppo = preset(name, total_phases=phases, kl_coef=0.0)
    result = ppo.run(context(tmp_path), parts(sampler=CachedSampler(gen_len=1)))
    assert result.after["eval/score"] > 0.9 > 0.4 > result.before["eval/score"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_first_ratios_are_one(name: str, tmp_path: Path) -> None:
    ppo = preset(name, batch_size=8, dtype="fp32")
    sampler = CachedSampler(gen_len=5, stop_at_eos=True)
    setup, state = start(ppo, tmp_path, task=RAGGED, sampler=sampler)
    experience = collect(ppo, setup, state)
    metrics = loss(ppo, setup, experience).metrics
    assert metrics["policy/approxkl"] < 1e-10
    assert metrics.get("policy/clipfrac", 0) == 0


@pytest.mark.parametrize("name", PRESETS)
def test_columns_without_tokens_change_no_gradient(name: str, tmp_path: Path) -> None:
    ppo = preset(name, batch_size=8, dtype="fp32")
    gradients = []
    for width in (5, 7):
        setup, _ = start(ppo, tmp_path, task=RAGGED)
        completions = fixed_completions(setup, width=5)
        groups = torch.arange(8) % 4
        completions = replace(completions, prompts=replace(completions.prompts, groups=groups))
        if width == 7:
            wide = torch.nn.functional.pad
            completions = replace(
                completions, tokens=wide(completions.tokens, (0, 2)),
                mask=wide(completions.mask, (0, 2)),
            )  # fmt: skip
        experience = fixed_experience(ppo, setup, completions)
        value = loss(ppo, setup, experience).loss
        if ppo.objective.aggregation == "constant":
            value = value * width  # its divisor counts positions
        value.backward()
        gradients.append([p.grad for p in setup.policy.parameters() if p.grad is not None])
    for narrow, wide_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(wide_gradient, narrow, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", [*PRESETS, "running_mean"])
def test_each_resumes_bit_by_bit(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"total_phases": 4, "batch_size": 8, "checkpoint_every": 1}
    ppo = preset("reinforce" if name == "running_mean" else name, **options)
    if name == "running_mean":
        estimator = Reinforce(baseline="running_mean")
        ppo = ppo_with(ppo, estimator=estimator, normalize_reward=False)
    assert_resume_is_exact(tmp_path, ppo, at=3)


def rollout_of(tmp_path: Path, ppo: PPO, scores: list[float]) -> Rollout:
    """Fixed completions with these scores, two of each prompt."""
    setup, _ = start(ppo, tmp_path, task=RAGGED)
    rollout = fixed_experience(ppo, setup, fixed_completions(setup)).rollout
    groups = torch.arange(8) // 2
    prompts = replace(rollout.completions.prompts, groups=groups)
    completions = replace(rollout.completions, prompts=prompts)
    return replace(rollout, completions=completions, scores=torch.tensor(scores))


SCORES = [1.0, 3.0, 2.0, 2.0, -1.0, 0.0, 0.5, 0.5]


def spread(rollout: Rollout) -> torch.Tensor:
    """The scores as rewards of last tokens."""
    last = rollout.completions.mask.sum(dim=1) - 1
    return torch.zeros_like(rollout.logprobs).scatter(1, last[:, None], rollout.scores[:, None])


def test_groups_of_equal_scores_are_counted_and_left_out(tmp_path: Path) -> None:
    ppo = ppo_with(batch_size=8, num_minibatches=2, samples_per_prompt=2, normalize_reward=False)
    rollout = rollout_of(tmp_path, ppo, SCORES)
    kept = GroupNormalized(scale="none")(rollout, spread(rollout))
    assert kept.learned is None
    estimator = GroupNormalized(scale="none", equal_groups="leave_out")
    experience = estimator(rollout, spread(rollout))
    assert experience.learned.tolist() == [True, True, False, False, True, True, False, False]
    assert estimator.metrics(experience) == {"groups/equal_fraction": 0.5}
    first = experience.advantages[:, 0].tolist()
    assert first == [-1.0, 1.0, 0.0, 0.0, -0.5, 0.5, 0.0, 0.0]

    ppo = ppo_with(ppo, estimator=estimator, batches_per_learning_phase=1)
    setup, state = start(ppo, tmp_path / "learning", task=RAGGED)
    steps = list(learn(ppo, setup, state, experience))
    assert len(steps) == 2
    # Two rows a step, as if there had been no others, in a new order each pass.
    rows_learned = [
        part.experience.advantages[:, 0].tolist() for part in parts_of_passes(experience, 5)
    ]
    passes = [rows_learned[i] + rows_learned[i + 1] for i in range(0, 10, 2)]
    assert [sorted(rows) for rows in passes] == [[-1.0, -0.5, 0.5, 1.0]] * 5
    assert len({tuple(rows) for rows in passes}) > 1


def test_the_best_of_a_group_is_learned_like_a_demonstration(tmp_path: Path) -> None:
    ppo = preset("raft", batch_size=8, samples_per_prompt=2, dtype="fp32", ent_coef=0.0)
    rollout = rollout_of(tmp_path, ppo, SCORES)
    experience = BestOfGroup()(rollout, spread(rollout))
    assert experience.learned.tolist() == [False, True, False, False, False, True, False, False]
    assert ppo.estimator.metrics(experience) == {"groups/equal_fraction": 0.5}
    setup, state = start(ppo, tmp_path / "learning", task=RAGGED)
    best = rollout[experience.learned].completions
    logits, _ = setup.policy(*best.sequences, prompt_len=best.prompt_len)
    logits = completion_logits(logits, best.prompt_len)
    nll = cross_entropy(logits[best.mask], best.tokens[best.mask]).detach()
    (step,) = learn(ppo, setup, state, experience)
    torch.testing.assert_close(step["loss/total"], nll)
    single = replace(experience, learned=torch.arange(8) == 5)
    [part] = parts_of_passes(single, 1)  # no step without rows
    assert part.experience.rollout.scores.tolist() == [SCORES[5]]


def test_groups_compare_rewards_with_their_kl_and_are_equal_by_score(tmp_path: Path) -> None:
    ppo = ppo_with(batch_size=8, samples_per_prompt=2, normalize_reward=False)
    rollout = rollout_of(tmp_path, ppo, SCORES)
    charges = torch.tensor([0.0, 2.5, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0])  # of the KL
    rewards, mask = spread(rollout), rollout.completions.mask
    rewards[:, 0] -= charges
    # Totals of 1 and .5, 1.5 and 1.75, -1 and 0, .5 twice.
    differences = [0.5, -0.5, -0.25, 0.25, -1.0, 1.0, 0.0, 0.0]
    for estimator, share in ((LeaveOneOut(), 1.0), (GroupNormalized(scale="none"), 0.5)):
        advantages = estimator(rollout, rewards).advantages
        expected = share * torch.tensor(differences)[:, None] * mask
        torch.testing.assert_close(advantages, expected)
    best = BestOfGroup()(rollout, rewards)
    assert best.learned.tolist() == [True, False, False, True, False, True, False, False]
    left_out = GroupNormalized(equal_groups="leave_out")
    experience = left_out(rollout, rewards)
    assert experience.learned.tolist() == [True, True, False, False, True, True, False, False]
    assert left_out.metrics(experience) == {"groups/equal_fraction": 0.5}


def parts_of_passes(experience: Experience, num_passes: int) -> list[Minibatch]:
    """The two minibatches of each pass."""
    return [
        *minibatches(
            experience, layout=Layout.of(experience.rollout.completions),
            generator=torch.Generator().manual_seed(0), num_minibatches=2, num_passes=num_passes,
            prepare=lambda part: part,
        )
    ]  # fmt: skip


@pytest.mark.usefixtures("unchecked")
def test_a_batch_of_equal_groups_teaches_nothing(tmp_path: Path) -> None:
    ppo = preset("dapo", total_phases=1, batch_size=8, samples_per_prompt=8)
    setup, state = start(ppo, tmp_path, task=RAGGED)
    phase(ppo, setup, state)
    setup = replace(setup, score=lambda completions: torch.ones(len(completions.texts)))
    before = [p.clone() for p in setup.policy.parameters()]
    metrics = phase(ppo, setup, state)
    assert metrics["groups/equal_fraction"] == 1
    assert metrics["policy/steps"] == 0
    assert all(map(torch.equal, before, setup.policy.parameters()))


def test_baselines_of_reinforce(tmp_path: Path) -> None:
    ppo = ppo_with(batch_size=8)
    rollout = rollout_of(tmp_path, ppo, SCORES)
    rewards, memory = spread(rollout), {}

    def first(baseline: str) -> torch.Tensor:
        estimator = Reinforce(baseline=baseline, decay=0.75)
        return credit(estimator, rollout, rewards, memory).advantages[:, 0]

    scores = torch.tensor(SCORES)
    torch.testing.assert_close(first("none"), scores)
    torch.testing.assert_close(first("batch_mean"), scores - 1)
    assert memory == {}
    memory["mean"] = 3.0
    torch.testing.assert_close(first("running_mean"), scores - 3)
    assert memory == {"mean": 2.5}
    torch.testing.assert_close(first("running_mean"), scores - 2.5)
    memory.clear()
    torch.testing.assert_close(first("running_mean"), scores - 1)  # of the first batch its own
    rewards = torch.full_like(rewards, torch.nan)  # the reward has failed
    first("running_mean")
    assert memory == {"mean": 1.0}


def test_a_phase_credits_with_the_memory_of_the_state(tmp_path: Path) -> None:
    rollout = rollout_of(tmp_path, ppo_with(batch_size=8), SCORES)
    estimator = Reinforce(baseline="running_mean", decay=0.75)
    ppo = ppo_with(batch_size=8, estimator=estimator, normalize_reward=False)
    setup, state = start(ppo, tmp_path / "run", task=RAGGED)
    phases = Phases(ppo, setup, state, Stopwatch())
    scores = torch.tensor(SCORES)  # of mean 1
    torch.testing.assert_close(phases.credit(rollout).advantages[:, 0], scores - 1)
    better = replace(rollout, scores=scores + 4)
    torch.testing.assert_close(phases.credit(better).advantages[:, 0], scores + 3)
    assert state.credit_memory == {"mean": 2.0}
    normalized = Phases(ppo_with(batch_size=8), *start(ppo, tmp_path / "other"), Stopwatch())
    totals = normalized.credit(rollout).rewards.sum(dim=1)
    torch.testing.assert_close(totals, (scores - 1) / (scores.std() + 1e-5))


def test_the_kl_of_the_loss_is_exact_or_k3(tmp_path: Path) -> None:
    exact, k3 = (ppo_with(batch_size=8, kl_penalty=name) for name in ("loss", "loss_k3"))
    setup, _ = start(exact, tmp_path, task=RAGGED)
    off_the_reference(setup, scale=0.3)
    experience = fixed_experience(exact, setup, fixed_completions(setup))
    mask, rollout = experience.rollout.completions.mask, experience.rollout
    layout = Layout.of(rollout.completions)
    new = setup.policy.engine.learning_pass(
        rollout, setup.reference.head, layout, temperature=setup.sampler.temperature
    )
    estimate = masked_mean(kl_estimate(new.logprobs, rollout.ref_logprobs, "k3"), mask)
    assert loss(exact, setup, experience).metrics["loss/kl"] == masked_mean(new.kl, mask)
    torch.testing.assert_close(loss(k3, setup, experience).metrics["loss/kl"], estimate.detach())
    assert estimate != masked_mean(new.kl, mask)
    grpo = preset("grpo", batch_size=8)
    by_sequence = sequence_mean(kl_estimate(new.logprobs, rollout.ref_logprobs, "k3"), mask)
    torch.testing.assert_close(
        loss(grpo, setup, experience).metrics["loss/kl"], by_sequence.detach()
    )


def test_the_prompt_of_a_group_is_run_once(tmp_path: Path) -> None:
    ppo = ppo_with(batch_size=12, samples_per_prompt=4, estimator=LeaveOneOut())
    setup, state = start(ppo, tmp_path, task=RAGGED)
    prompts = next(state.prompts).repeated(4)
    shuffled = prompts[torch.tensor([5, 0, 11, 1, 4, 8])]
    rows_of, index = shuffled.distinct()
    assert [shuffled.texts[i] for i in rows_of.tolist()] == list(prompts.texts[::4])
    assert [shuffled.texts[i] for i in rows_of[index].tolist()] == list(shuffled.texts)

    policy, seen = setup.policy, []
    policy.language_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[0]),
        with_kwargs=True,
    )
    _, hidden = prefill(policy, shuffled, shuffled.mask, 12)
    alone = policy.hidden_states(shuffled.tokens, shuffled.mask)[:, -1]
    assert seen == [3, 6]
    torch.testing.assert_close(hidden, alone, rtol=0, atol=1e-5)
    generation = setup.sampler(policy, shuffled, torch.Generator().manual_seed(0))
    ungrouped = replace(shuffled, groups=None)
    other = setup.sampler(policy, ungrouped, torch.Generator().manual_seed(0))
    assert torch.equal(generation.completions.tokens, other.completions.tokens)
    torch.testing.assert_close(generation.logprobs, other.logprobs, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    for name in ("none", "running_mean"):
        with pytest.raises(ValidationError, match=f"before estimator.baseline={name} does: set it"):
            ppo_with(estimator=Reinforce(baseline=name))
    with pytest.raises(ValidationError, match="samples_per_prompt=1: GroupNormalized needs at l"):
        ppo_with(estimator=GroupNormalized())
    with pytest.raises(ValidationError, match="samples_per_prompt=1: BestOfGroup needs at least"):
        ppo_with(estimator=BestOfGroup())


def test_the_sampled_estimates_of_the_kl_are_logged(tmp_path: Path) -> None:
    ppo = preset("grpo", total_phases=2, batch_size=16)
    ppo.run(context(tmp_path), parts(task=RAGGED))
    last = rows(tmp_path)[-2]
    assert last["objective/kl_k3"] > 0
    assert last["objective/kl_k3_var"] < last["objective/kl_k1_var"]
    assert abs(last["objective/kl_k1"] - last["objective/kl"]) < 1
    assert "groups/equal_fraction" in last

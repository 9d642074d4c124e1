"""PPO: its objective against a loop in float64, its invariants, and that it learns."""

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.functional.logprobs import completion_logits, token_logprobs
from rlhf_exp.models.loading import load_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.keyword import Keyword
from rlhf_exp.rewards.length import Length
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.measure import measure
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.settings import ConfigError, settings
from rlhf_exp.stages.actors import Actors
from rlhf_exp.stages.evaluation import checked_scores
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.stages.train_state import TrainState
from rlhf_exp.tasks.labelled_text import LabelledTextFile
from rlhf_exp.tasks.prompts import prompt_stream
from rlhf_exp.training.context import TrainingError
from rlhf_exp.training.optim import AdamWSettings, WarmupDecay
from rlhf_exp.training.timing import Stopwatch
from rlhf_exp.types import Completions, Experience

from .toy import RAGGED, Echoed, EchoTask, ToyTask, context, parts, rows, start


def collect(ppo: PPO, actors: Actors, state: TrainState) -> Experience:
    prompts = next(prompt_stream(actors.train_prompts, ppo.batch_size, state.prompt_generator))
    generation = actors.sampler(actors.policy, prompts, state.sample_generator)
    rollout = measure(
        actors.policy,
        actors.reference,
        generation,
        actors.score(generation.completions),
        temperature=actors.sampler.temperature,
    )
    return ppo.build_experience(rollout)


SAMPLERS = [
    CachedSampler(gen_len=6),
    CachedSampler(gen_len=6, temperature=0.7, stop_at_eos=True),
    CachedSampler(gen_len=6, top_k=3),
    BridgeSampler(gen_len=6, temperature=1.3, stop_at_eos=True),
]


@pytest.mark.parametrize("engine", ["fast", "hooked"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["plain", "eos", "top_k", "bridge"])
def test_first_ratio_of_a_phase_is_one(
    sampler: Sampler, architecture: str, engine: str, tmp_path: Path
) -> None:
    model = Scratch(
        architecture=architecture, num_layers=2, d_model=16, num_heads=2, context_len=16,
        dropout=0.3, engine=engine,
    )  # fmt: skip
    ppo = PPO(batch_size=16)
    actors, state = start(ppo, tmp_path, model=model, sampler=sampler, task=RAGGED)
    for _ in range(2):  # a phase that has learned must satisfy it as well
        experience = collect(ppo, actors, state)
        rollout, completions = experience.rollout, experience.rollout.completions
        with torch.no_grad():
            logits, values = actors.policy(*completions.sequences)
        logits = completion_logits(logits, completions.prompt_len) / sampler.temperature
        ratio = (token_logprobs(logits, completions.tokens) - rollout.logprobs).exp()
        seen_values = values[:, completions.prompt_len - 1 : -1]
        mask = completions.mask
        assert (ratio[mask] - 1).abs().max() < 1e-5
        assert (seen_values - rollout.values)[mask].abs().max() < 1e-5
        list(ppo.learn(state, experience, actors.reference, temperature=sampler.temperature))


def test_approxkl_and_clipfrac_of_the_first_update_are_zero(tmp_path: Path) -> None:
    ppo = PPO(batch_size=16, num_minibatches=2)
    actors, state = start(ppo, tmp_path, task=RAGGED)
    experience = collect(ppo, actors, state)
    updates = list(ppo.learn(state, experience, actors.reference, temperature=1.0))
    assert updates[0]["policy/approxkl"] < 1e-10
    assert updates[0]["policy/clipfrac"] == 0
    assert updates[-1]["policy/approxkl"] > 1e-6


@pytest.mark.parametrize("kl_penalty", ["loss", "reward"])
@pytest.mark.parametrize("value_clip_coef", [None, 0.05])
def test_loss_equals_a_loop_over_tokens(
    kl_penalty: str, value_clip_coef: float | None, tmp_path: Path
) -> None:
    ppo = PPO(
        batch_size=8, kl_coef=0.7, ent_coef=0.05, vf_coef=0.3, clip_coef=0.1,
        kl_penalty=kl_penalty, value_clip_coef=value_clip_coef,
    )  # fmt: skip
    temperature = 0.8
    sampler = CachedSampler(gen_len=5, temperature=temperature, stop_at_eos=True)
    actors, state = start(ppo, tmp_path, task=RAGGED, sampler=sampler)
    list(ppo.learn(state, collect(ppo, actors, state), actors.reference, temperature=temperature))
    experience = collect(ppo, actors, state)
    list(ppo.learn(state, experience, actors.reference, temperature=temperature))
    output = ppo.loss(actors.policy, actors.reference, experience, temperature=temperature)

    rollout, completions = experience.rollout, experience.rollout.completions
    tokens, mask = completions.sequences
    with torch.no_grad():
        logits, values = actors.policy(tokens, mask)
        ref_logits = actors.reference.unembed(actors.reference.hidden_states(tokens, mask))
    total, count, start_at = 0.0, 0, completions.prompt_len - 1
    for row in range(8):
        for t in range(int(completions.mask[row].sum())):
            p = (logits[row, start_at + t].double() / temperature).softmax(-1).tolist()
            q = (ref_logits[row, start_at + t].double() / temperature).softmax(-1).tolist()
            token = int(completions.tokens[row, t])
            ratio = math.exp(math.log(p[token]) - rollout.logprobs[row, t].item())
            advantage = experience.advantages[row, t].item()
            clipped = min(max(ratio, 0.9), 1.1)
            value, target = values[row, start_at + t].item(), experience.returns[row, t].item()
            error = (value - target) ** 2
            if value_clip_coef is not None:
                old = rollout.values[row, t].item()
                near = old + min(max(value - old, -value_clip_coef), value_clip_coef)
                error = max(error, (near - target) ** 2)
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            total += min(ratio * advantage, clipped * advantage) - 0.3 * 0.5 * error
            total += 0.05 * -sum(a * math.log(a) for a in p)
            total -= (0.7 if kl_penalty == "loss" else 0.0) * kl
            count += 1
    assert output.loss.item() == pytest.approx(-total / count, abs=2e-5)


def test_reward_penalty_charges_each_token_its_log_ratio(tmp_path: Path) -> None:
    ppo = PPO(batch_size=8, kl_coef=0.5, kl_penalty="reward", normalize_reward=False)
    actors, state = start(ppo, tmp_path, task=RAGGED, sampler=CachedSampler(gen_len=5))
    list(ppo.learn(state, collect(ppo, actors, state), actors.reference, temperature=1.0))
    experience = collect(ppo, actors, state)
    rollout = experience.rollout
    for row in range(8):
        for t in range(5):
            charge = 0.5 * (rollout.logprobs[row, t] - rollout.ref_logprobs[row, t]).item()
            score = rollout.scores[row].item() if t == 4 else 0.0
            assert experience.rewards[row, t].item() == pytest.approx(score - charge, abs=1e-6)
    assert rollout.kl.sum() > 0


def test_lambda_zero_without_whitening_is_one_step(tmp_path: Path) -> None:
    ppo = PPO(batch_size=8, gae_lambda=0.0, whiten_advantages="none", normalize_reward=False)
    actors, state = start(ppo, tmp_path)
    experience = collect(ppo, actors, state)
    values, scores = experience.rollout.values, experience.rollout.scores
    one_step = torch.cat([values[:, 1:], scores[:, None]], dim=1)
    assert torch.equal(experience.advantages, one_step - values)
    torch.testing.assert_close(experience.returns, one_step)


def test_scores_are_normalised_over_the_batch_when_asked(tmp_path: Path) -> None:
    ppo, raw = PPO(batch_size=16), PPO(batch_size=16, normalize_reward=False)
    actors, state = start(ppo, tmp_path, reward=Length(target_tokens=3), sampler=SAMPLERS[1])
    experience = collect(ppo, actors, state)
    scores, mask = experience.rollout.scores, experience.rollout.completions.mask
    last = mask.sum(dim=1) - 1
    rows = torch.arange(16)
    normalised = (scores - scores.mean()) / (scores.std() + 1e-5)
    torch.testing.assert_close(experience.rewards[rows, last], normalised)
    assert torch.equal(raw.build_experience(experience.rollout).rewards[rows, last], scores)
    assert experience.rewards.count_nonzero() == 16
    assert scores.std() > 0.1


def test_advantages_are_whitened_once_over_the_batch_and_returns_are_not(tmp_path: Path) -> None:
    plain, white = PPO(batch_size=16, whiten_advantages="none"), PPO(batch_size=16)
    actors, state = start(plain, tmp_path, task=RAGGED)
    experience = collect(plain, actors, state)
    whitened = white.build_experience(experience.rollout)
    flat = experience.advantages[experience.rollout.completions.mask]
    expected = (flat - flat.mean()) / flat.std()
    torch.testing.assert_close(
        whitened.advantages.flatten(), expected.flatten(), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(whitened.returns, experience.returns)


def test_minibatch_whitening_whitens_each_minibatch(tmp_path: Path) -> None:
    each = PPO(batch_size=16, whiten_advantages="minibatch")
    none = PPO(batch_size=16, whiten_advantages="none")
    actors, state = start(each, tmp_path, task=RAGGED)
    batch = collect(each, actors, state)[torch.arange(4)]
    flat = batch.advantages[batch.rollout.completions.mask]
    shifted = (batch.advantages - flat.mean()) / flat.std()
    by_hand = Experience(
        rollout=batch.rollout, rewards=batch.rewards, advantages=shifted, returns=batch.returns
    )
    a = each.loss(actors.policy, actors.reference, batch, temperature=1.0).loss
    b = none.loss(actors.policy, actors.reference, by_hand, temperature=1.0).loss
    c = none.loss(actors.policy, actors.reference, batch, temperature=1.0).loss
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (a - c).abs() > 1e-4


def test_garbage_in_the_padding_changes_no_gradient(tmp_path: Path) -> None:
    ppo = PPO(batch_size=8)
    sampler = CachedSampler(gen_len=6, stop_at_eos=True)
    actors, state = start(ppo, tmp_path, task=RAGGED, sampler=sampler)
    clean = collect(ppo, actors, state)
    mask = clean.rollout.completions.mask
    assert not mask.all()

    def gradients(experience: Experience) -> list[torch.Tensor]:
        actors.policy.zero_grad()
        ppo.loss(actors.policy, actors.reference, experience, temperature=1.0).loss.backward()
        return [p.grad.clone() for p in actors.policy.parameters() if p.grad is not None]

    def dirty(x: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, x, torch.full_like(x, torch.nan))

    rollout = clean.rollout
    spoiled = Experience(
        rollout=type(rollout)(
            completions=type(rollout.completions)(
                prompts=rollout.completions.prompts,
                tokens=torch.where(mask, rollout.completions.tokens, 5),
                mask=mask,
                texts=rollout.completions.texts,
            ),
            logprobs=dirty(rollout.logprobs),
            ref_logprobs=dirty(rollout.ref_logprobs),
            ref_hidden=rollout.ref_hidden,
            values=dirty(rollout.values),
            kl=dirty(rollout.kl),
            entropy=dirty(rollout.entropy),
            kept_mass=dirty(rollout.kept_mass),
            scores=rollout.scores,
        ),
        rewards=dirty(clean.rewards),
        advantages=dirty(clean.advantages),
        returns=dirty(clean.returns),
    )
    for a, b in zip(gradients(clean), gradients(spoiled), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def final_metrics(path: Path, ppo: PPO, seed: int = 1, **replaced: object) -> dict[str, float]:
    return ppo.run(context(path, seed), **parts(**replaced))["after"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bandit_is_solved(tmp_path: Path, seed: int) -> None:
    ppo = PPO(total_phases=25, kl_coef=0.0, eval_every=25, eval_samples=256)
    after = final_metrics(tmp_path, ppo, seed, sampler=CachedSampler(gen_len=1))
    assert after["eval/score"] > 0.9


def test_a_longer_answer_is_learned_through_the_value_head(tmp_path: Path) -> None:
    ppo = PPO(total_phases=40, kl_coef=0.0, eval_every=40)
    sampler = CachedSampler(gen_len=8, stop_at_eos=True)
    result = ppo.run(
        context(tmp_path), **parts(sampler=sampler, reward=Length(target_tokens=2), task=RAGGED)
    )
    assert result["after"]["eval/score"] > result["before"]["eval/score"] + 0.5
    assert result["after"]["eval/len_mean"] < 4 < result["before"]["eval/len_mean"]


def test_a_reward_that_is_always_the_same_moves_nothing_far(tmp_path: Path) -> None:
    ppo = PPO(total_phases=20, eval_every=20)
    nothing = Keyword(keywords=["absent"])
    moved = final_metrics(tmp_path / "a", ppo, optimizer=AdamWSettings())
    still = final_metrics(tmp_path / "b", ppo, reward=nothing, optimizer=AdamWSettings())
    assert still["eval/kl"] < 0.01
    assert moved["eval/kl"] > 3 * still["eval/kl"]


def test_a_huge_penalty_holds_the_policy(tmp_path: Path) -> None:
    held = PPO(total_phases=20, eval_every=20, kl_coef=1000.0)
    free = PPO(total_phases=20, eval_every=20, kl_coef=0.0)
    held_kl = final_metrics(tmp_path / "a", held)["eval/kl"]
    assert held_kl < 5e-3
    assert final_metrics(tmp_path / "b", free)["eval/kl"] > 20 * held_kl


def test_two_runs_are_equal_and_another_seed_is_not(tmp_path: Path) -> None:
    ppo = PPO(total_phases=3, eval_every=2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo.run(context(tmp_path / name, seed), **parts(task=RAGGED))
    a, b, c = (
        [
            {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in "abc"
    )
    assert a == b
    assert a != c
    weights = [(tmp_path / n / "model" / "model.safetensors").read_bytes() for n in "ab"]
    assert weights[0] == weights[1]


def test_a_run_leaves_metrics_samples_and_a_policy(tmp_path: Path) -> None:
    ppo = PPO(total_phases=4, eval_every=3, eval_samples=16)
    p = parts(sampler=CachedSampler(gen_len=4, top_k=5), schedule=WarmupDecay(warmup_steps=2))
    actors_before, _ = start(ppo, tmp_path / "other", **p)
    ppo.run(context(tmp_path), **p)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows if "eval/score" in row] == [0, 3, 4]
    phases = [row for row in rows if "objective/scores" in row]
    assert [row["phase"] for row in phases] == [1, 2, 3, 4]
    for name in [
        "objective/scores",
        "objective/kl",
        "objective/kl_sum",
        "objective/entropy",
        "policy/approxkl",
        "policy/clipfrac",
        "loss/policy",
        "loss/value",
        "val/explained_variance",
        "grad_norm/base",
        "grad_norm/head",
        "lr/base",
        "lr/head",
        "sample/len_mean",
        "sample/distinct_3",
        "sample/kept_mass",
        "time/rollout_s",
        "time/learn_s",
        "time/tokens_per_s",
    ]:
        assert all(math.isfinite(row[name]) for row in phases), name
    multipliers = [row["lr/base"] / 3e-3 for row in phases]
    assert multipliers == pytest.approx([0.5, 1.0, 1.0, 1 - 0.9 / 2])
    assert phases[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < phases[0]["sample/kept_mass"] < 1
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["phase"] for s in samples] == [0] * 16 + [3] * 16 + [4] * 16
    saved = load_policy(tmp_path)
    tokens = torch.tensor([[1, 4, 5, 6]])
    before, after = actors_before.policy(tokens)[0], saved(tokens)[0]
    assert (before - after).abs().max() > 1e-3


def test_a_phase_measures_at_the_samplers_temperature(tmp_path: Path) -> None:
    ppo = PPO(batch_size=16)
    sampler = CachedSampler(gen_len=6, temperature=0.3, stop_at_eos=True)
    twins = [start(ppo, tmp_path, sampler=sampler, task=RAGGED) for _ in range(2)]
    rollout = collect(ppo, *twins[0]).rollout
    actors, state = twins[1]
    prompts = next(prompt_stream(actors.train_prompts, 16, state.prompt_generator))
    metrics = ppo.phase(state, prompts, actors, Stopwatch())
    entropy = rollout.entropy[rollout.completions.mask].mean().item()
    assert metrics["objective/entropy"] == pytest.approx(entropy, abs=1e-6)
    assert entropy < 2.75  # at temperature 1 it is 2.770


def test_gradients_are_clipped_and_logged_as_they_were(tmp_path: Path) -> None:
    moves, norms = [], []
    for max_grad_norm in (1e9, 1e-9):
        ppo = PPO(batch_size=16, num_minibatches=1, max_grad_norm=max_grad_norm)
        actors, state = start(ppo, tmp_path)
        experience = collect(ppo, actors, state)
        before = [p.clone() for p in actors.policy.parameters()]
        norms.append(next(ppo.learn(state, experience, actors.reference, temperature=1.0)))
        pairs = zip(before, actors.policy.parameters(), strict=True)
        moves.append(max((a - b).abs().max().item() for a, b in pairs))
    assert norms[0]["grad_norm/base"] == norms[1]["grad_norm/base"] > 1e-3
    # Adam divides by the gradient's own size, but not below its eps of 1e-5.
    assert moves[1] < 1e-3 * moves[0]


def test_the_reference_is_the_same_after_a_run(tmp_path: Path) -> None:
    ppo = PPO(total_phases=2)
    actors, state = start(ppo, tmp_path)
    before = [p.clone() for p in actors.reference.parameters()]
    prompts = prompt_stream(actors.train_prompts, ppo.batch_size, state.prompt_generator)
    ppo.phase(state, next(prompts), actors, Stopwatch())
    assert all(
        torch.equal(a, b) for a, b in zip(before, actors.reference.parameters(), strict=True)
    )
    assert all(p.grad is None for p in actors.reference.parameters())
    trained = actors.policy.language_model.parameters()
    assert not all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))


@settings
class Broken:
    """A reward that returns one bad number once it has been called `good` times."""

    value: float
    good: int = 0

    def load(self, device: torch.device) -> object:
        calls = iter(range(100))

        def score(completions: Completions) -> torch.Tensor:
            scores = torch.zeros(len(completions.texts))
            scores[1] = self.value if next(calls) >= self.good else 0.0
            return scores

        return score


@pytest.mark.parametrize(("good", "where"), [(0, "phase 0: .* of 4 "), (2, "phase 2: .* of 32 ")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_stops_the_run(
    tmp_path: Path, value: float, good: int, where: str
) -> None:
    ppo = PPO(total_phases=3, eval_samples=4, eval_every=3)
    with pytest.raises(TrainingError, match=rf"{where}samples, the first: 'w0 w1") as error:
        ppo.run(context(tmp_path), **parts(reward=Broken(value=value, good=good)))
    assert f"the reward gave {value} for 1 of" in str(error.value)


def test_a_reward_must_give_one_score_each(tmp_path: Path) -> None:
    actors, _ = start(PPO(), tmp_path)
    generation = actors.sampler(actors.policy, actors.train_prompts, torch.Generator())
    with pytest.raises(TrainingError, match=r"phase 3: .* shape \(2,\) for 1 samples"):
        checked_scores(lambda _: torch.zeros(2), generation.completions, phase=3)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    ppo = PPO(total_phases=2)
    actors, state = start(ppo, tmp_path)
    experience = collect(ppo, actors, state)
    state.phase = 7
    with torch.no_grad():
        actors.policy.value_head[2].bias.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"phase 7: the loss is not finite .*loss/value nan"):
        list(ppo.learn(state, experience, actors.reference, temperature=1.0))


def test_batch_size_must_be_a_multiple_of_num_minibatches() -> None:
    with pytest.raises(
        ValidationError, match="batch_size=30 must be a multiple of num_minibatches=4"
    ):
        PPO(batch_size=30)


def test_prompt_and_completion_must_fit_the_context(tmp_path: Path) -> None:
    message = "prompt of 3 tokens and sampler.gen_len=14 .* context of 16 tokens.* at most 13"
    with pytest.raises(ConfigError, match=message):
        PPO().run(context(tmp_path), **parts(sampler=CachedSampler(gen_len=14)))
    assert not list(tmp_path.iterdir())


def test_schedule_must_fit_the_phases() -> None:
    problems = PPO(total_phases=5).check(
        task=ToyTask(), sampler=CachedSampler(), schedule=WarmupDecay(warmup_steps=5)
    )
    assert problems == [
        "schedule.warmup_steps=5 must be below stage.total_phases=5: lower the first or raise the"
        " second"
    ]
    assert not PPO(total_phases=6).check(
        task=ToyTask(), sampler=CachedSampler(), schedule=WarmupDecay(warmup_steps=5)
    )


def test_a_task_that_knows_answers_is_measured_by_them(tmp_path: Path) -> None:
    ppo = PPO(total_phases=2, eval_every=1, eval_samples=30)
    sampler = CachedSampler(gen_len=3, stop_at_eos=True)
    result = ppo.run(context(tmp_path), **parts(task=EchoTask(), reward=Echoed(), sampler=sampler))
    evaluations = [row for row in rows(tmp_path) if "eval/score" in row]
    assert [row["phase"] for row in evaluations] == [0, 1, 2]
    for row in evaluations:
        assert row["eval/true_reward"] == pytest.approx(row["eval/score"])
        assert {"eval/reward_gap", "eval/exact_match", "eval/greedy_exact_match"} < set(row)
    assert result["before"] == {k: v for k, v in evaluations[0].items() if k != "phase"}
    assert result["after"] == {k: v for k, v in evaluations[-1].items() if k != "phase"}
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert {"true_reward", "exact"} < set(rows(tmp_path, "samples.jsonl")[0])


def test_a_task_whose_file_is_missing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        PPO().check(
            task=LabelledTextFile(path="nowhere.jsonl"),
            schedule=WarmupDecay(),
            sampler=CachedSampler(),
        )

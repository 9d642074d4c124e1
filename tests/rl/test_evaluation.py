"""Evaluation: fresh samples from the full distribution, paired between calls."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_exp.rewards.attempts import CheckedReward
from rlhf_exp.rewards.keyword import Keyword
from rlhf_exp.rewards.length import Length
from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rewards.weighted_sum import Term, WeightedSum
from rlhf_exp.rl import evaluation
from rlhf_exp.rl.evaluation import Evaluation, evaluate, metric_names, read_evaluations
from rlhf_exp.rl.exact_answers import exact_match
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.stages.ppo import PPO

from ..builders import assert_near
from .toy import RAGGED, Echoed, EchoTask, echo_policy, parts, pass_shape, start


def run(setup: Setup, *, num_samples: int = 6, seed: int = 1) -> Evaluation:
    reward = CheckedReward(setup.score)
    return evaluate(setup, reward, num_samples=num_samples, seed=seed, phase=0)


def test_a_sum_of_rewards_tells_the_score_of_each_term(tmp_path: Path) -> None:
    terms = {
        "short": Term(weight=2.0, reward=Length(target_tokens=2)),
        "word": Term(weight=-0.5, reward=Keyword(keywords=["w7"])),
    }
    reward = WeightedSum(terms=terms)
    setup, _ = start(PPO(), tmp_path, task=RAGGED, reward=reward)
    result = run(setup, num_samples=40)
    assert {*result.metrics} == {*PPO().metric_names(parts(task=RAGGED, reward=reward))}
    words = [float("w7" in (row["prompt"] + row["completion"]).split()) for row in result.samples]
    assert [row["score_word"] for row in result.samples] == words
    assert 0 < sum(words) < 40
    for row in result.samples:
        assert row["score"] == pytest.approx(2 * row["score_short"] - 0.5 * row["score_word"])
    assert result.metrics["eval/score_word"] == pytest.approx(sum(words) / 40)
    assert result.metrics["eval/score"] == pytest.approx(
        2 * result.metrics["eval/score_short"] - 0.5 * result.metrics["eval/score_word"]
    )


def test_without_a_reward_all_else_is_measured(tmp_path: Path) -> None:
    sampler = CachedSampler(gen_len=4, stop_at_eos=True)
    taken = parts(task=EchoTask(), reward=Echoed(), sampler=sampler)
    setup, _ = start(PPO(), tmp_path, task=EchoTask(), reward=Echoed(), sampler=sampler)
    scored = run(setup)
    assert {*scored.metrics} == {*metric_names(taken.task, taken.reward)}
    bare = evaluate(setup, None, num_samples=6, seed=1, phase=0)
    assert {*scored.metrics} - {*bare.metrics} == {"eval/score", "eval/reward_gap"}
    assert bare.metrics.items() < scored.metrics.items()
    assert {*bare.metrics} == {*metric_names(taken.task, None)}
    for with_score, without in zip(scored.samples, bare.samples, strict=True):
        assert {**without, "score": with_score["score"]} == with_score


def test_a_term_that_is_not_finite_is_named_as_any_score(tmp_path: Path) -> None:
    term = Term(weight=0.0, reward=NotANumber())
    setup, _ = start(PPO(), tmp_path, reward=WeightedSum(terms={"bad": term}))
    with pytest.raises(RewardError, match="phase 0: the reward gave nan for 6 of 6 samples"):
        run(setup)


class NotANumber:
    """A reward that is never a number."""

    def load(self, device: torch.device) -> RewardFunction:
        return lambda completions: torch.full((len(completions.texts),), math.nan)


def test_metrics_by_hand(tmp_path: Path) -> None:
    sampler = CachedSampler(gen_len=5, stop_at_eos=True)
    setup, _ = start(PPO(), tmp_path, task=RAGGED, sampler=sampler)
    with torch.no_grad():
        for p in setup.policy.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    result = run(setup, num_samples=400)
    tokenizer = setup.policy.tokenizer
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
            p = setup.policy(ids)[0][0].double().log_softmax(-1)
            q = (
                setup.reference.unembed(
                    setup.reference.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))
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
    setup, state = start(PPO(), tmp_path, task=RAGGED)
    first = run(setup)
    setup.sampler(setup.policy, setup.train_prompts, state.sample_generator)
    torch.rand(3)
    assert run(setup).samples == first.samples
    assert run(setup, seed=2).samples != first.samples


def test_prompts_are_repeated_evenly(tmp_path: Path) -> None:
    setup, _ = start(PPO(), tmp_path, task=RAGGED)
    prompts = [s["prompt"] for s in run(setup, num_samples=10).samples]
    counts = sorted(prompts.count(p) for p in RAGGED.prompts)
    assert counts == [2, 2, 3, 3]


def test_filters_and_temperature_of_the_sampler_are_left_out(tmp_path: Path) -> None:
    greedy = CachedSampler(gen_len=5, top_k=1, temperature=0.5)
    a, _ = start(PPO(), tmp_path, sampler=greedy)
    b, _ = start(PPO(), tmp_path, sampler=CachedSampler(gen_len=5))
    assert run(a).samples == run(b).samples
    assert len({s["completion"] for s in run(a).samples}) > 1


def test_an_untouched_policy_has_no_kl(tmp_path: Path) -> None:
    setup, _ = start(PPO(), tmp_path)
    assert abs(run(setup).metrics["eval/kl"]) < 1e-6


def test_the_first_and_the_last_evaluation_are_read_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for phase in (0, 1, 2, 3):
        folder.log(phase, {"loss/total": 1.0})
        if phase != 1:
            folder.log(phase, {"eval/score": float(phase), "eval/kl": 0.5})
            folder.log_samples(phase, [{"score": phase}, {"score": phase + 0.5}])
    first, last = read_evaluations(folder)
    assert first.metrics == {"eval/score": 0.0, "eval/kl": 0.5}
    assert last.metrics == {"eval/score": 3.0, "eval/kl": 0.5}
    assert [s["score"] for s in first.samples] == [0, 0.5]
    assert [s["score"] for s in last.samples] == [3, 3.5]


@pytest.mark.parametrize(("rows", "sizes"), [(None, [8]), (8, [8]), (5, [5, 3]), (1, [1] * 8)])
def test_so_many_prompts_are_sampled_at_once(
    tmp_path: Path, rows: int | None, sizes: list[int]
) -> None:
    setup, _ = start(PPO(), tmp_path, task=RAGGED)
    prompts = setup.train_prompts[torch.tensor([0, 1, 2, 3, 1, 2, 0, 3])]
    whole = setup.sampler.greedy(setup.policy, prompts, torch.Generator())
    seen: list[tuple[int, int]] = []
    hook = setup.policy.language_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(pass_shape(kwargs)), with_kwargs=True
    )
    parts = evaluation.sample(
        setup.sampler.greedy, setup.policy, prompts, torch.Generator(), phase=1, rows=rows
    )
    hook.remove()
    assert [batch for batch, columns in seen if columns > 1] == sizes
    assert torch.equal(parts.completions.tokens, whole.completions.tokens)
    assert parts.completions.texts == whole.completions.texts
    assert parts.completions.prompts.texts == prompts.texts
    for name in ("logprobs", "values", "hidden"):
        assert_near(getattr(parts, name), getattr(whole, name))


def test_parts_of_a_batch_are_drawn_one_after_the_other(tmp_path: Path) -> None:
    setup, _ = start(PPO(), tmp_path)
    prompts = setup.train_prompts[torch.zeros(8, dtype=torch.long)]
    generator = torch.Generator().manual_seed(0)
    drawn = evaluation.sample(setup.sampler, setup.policy, prompts, generator, phase=1, rows=4)
    tokens = drawn.completions.tokens
    assert not torch.equal(tokens[:4], tokens[4:])


def echo_actors(path: Path, *, reward: object, sampler: Sampler) -> Setup:
    """Setup of EchoTask whose policy gives some answers right."""
    setup, _ = start(PPO(), path, task=EchoTask(), reward=reward, sampler=sampler)
    policy = copy.deepcopy(echo_policy())
    with torch.no_grad():  # else there would be no KL
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    return replace(setup, policy=policy, reference=echo_policy().frozen_reference())


@pytest.mark.parametrize("stop_at_eos", [True, False])
def test_answers_are_measured_beside_the_score(tmp_path: Path, stop_at_eos: bool) -> None:
    sampler = CachedSampler(gen_len=3, stop_at_eos=stop_at_eos, temperature=0.4)
    reward = Length(target_tokens=2)
    setup = echo_actors(tmp_path, reward=reward, sampler=sampler)
    result = run(setup, num_samples=200)
    metrics, task = result.metrics, EchoTask()
    assert {*metrics} == {*PPO().metric_names(parts(task=task))}
    true = [task.true_reward(s["prompt"], s["completion"]) for s in result.samples]
    assert [s["true_reward"] for s in result.samples] == pytest.approx(true)
    assert metrics["eval/true_reward"] == pytest.approx(sum(true) / 200)
    assert metrics["eval/reward_gap"] == pytest.approx(
        metrics["eval/score"] - metrics["eval/true_reward"]
    )
    assert abs(metrics["eval/reward_gap"]) > 0.05
    exact = [s["exact"] for s in result.samples]
    assert metrics["eval/exact_match"] == pytest.approx(sum(exact) / 200)
    # What is exact reads as the answer, but what reads as the answer may not have ended.
    assert all(task.answer(s["prompt"]) == s["completion"] for s in result.samples if s["exact"])
    if stop_at_eos:
        assert 10 < sum(exact) < 190
        assert metrics["eval/len_mean"] < 3
    else:  # then an answer of one token and EOS goes on
        assert 0 < sum(exact) < 190
        assert all(len(s["completion"].split()) == 2 for s in result.samples if s["exact"])


def test_each_prompt_is_answered_greedily_once(tmp_path: Path) -> None:
    sampler = CachedSampler(gen_len=3, stop_at_eos=True, top_k=7)
    setup = echo_actors(tmp_path, reward=Echoed(), sampler=sampler)
    everything = exact_match(
        setup.policy, EchoTask(), setup.eval_prompts, sampler.greedy, torch.Generator()
    )
    assert 0 < everything < 1
    for num_samples in (24, 100):
        metrics = run(setup, num_samples=num_samples).metrics
        assert metrics["eval/greedy_exact_match"] == pytest.approx(everything)
    some = run(setup, num_samples=6)
    prompts = [s["prompt"] for s in some.samples]
    chosen = [setup.eval_prompts.texts.index(prompt) for prompt in prompts]
    greedily = exact_match(
        setup.policy,
        EchoTask(),
        setup.eval_prompts[torch.tensor(chosen)],
        sampler.greedy,
        torch.Generator(),
    )
    assert some.metrics["eval/greedy_exact_match"] == pytest.approx(greedily)


def test_the_true_reward_as_reward_leaves_no_gap(tmp_path: Path) -> None:
    sampler = CachedSampler(gen_len=3, stop_at_eos=True)
    setup = echo_actors(tmp_path, reward=Echoed(), sampler=sampler)
    result = run(setup, num_samples=30)
    assert result.metrics["eval/reward_gap"] == pytest.approx(0, abs=1e-6)
    assert [s["score"] for s in result.samples] == [s["true_reward"] for s in result.samples]


def test_answers_change_no_sample_and_no_other_metric(tmp_path: Path) -> None:
    sampler = CachedSampler(gen_len=3, stop_at_eos=True)
    setup = echo_actors(tmp_path, reward=Echoed(), sampler=sampler)
    plain = run(replace(setup, answers=None))
    judged = run(setup)
    assert plain.metrics == {name: judged.metrics[name] for name in plain.metrics}
    assert set(judged.metrics) - set(plain.metrics) == {
        "eval/true_reward", "eval/reward_gap", "eval/exact_match", "eval/greedy_exact_match",
    }  # fmt: skip
    for a, b in zip(plain.samples, judged.samples, strict=True):
        assert a == {name: b[name] for name in a}
        assert set(b) - set(a) == {"true_reward", "exact"}


def test_what_comes_after_eos_costs_nothing(tmp_path: Path) -> None:
    setup = echo_actors(
        tmp_path, reward=Echoed(), sampler=CachedSampler(gen_len=9, stop_at_eos=True)
    )
    result = run(setup, num_samples=80)
    tokenizer = setup.policy.tokenizer
    # Only of an exact answer all tokens are known: its words, then EOS.
    exact = [sample for sample in result.samples if sample["exact"]]
    assert len(exact) > 20
    for sample in exact:
        words = tokenizer(sample["completion"], add_special_tokens=False)["input_ids"]
        prompt = [1, *tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]]
        ids = torch.tensor([[*prompt, *words, 2]])
        with torch.no_grad():
            p, q = (m.language_model(input_ids=ids).logits[0].double().log_softmax(-1)
                    for m in (setup.policy, setup.reference))  # fmt: skip
        kl = (p.exp() * (p - q)).sum(dim=-1)[len(prompt) - 1 : -1].sum().item()
        assert sample["kl_sum"] == pytest.approx(kl, abs=1e-5)
    assert max(sample["kl_sum"] for sample in exact) > 1e-3
    total = sum(sample["kl_sum"] for sample in result.samples)
    length = result.metrics["eval/len_mean"]
    assert length < 8
    assert result.metrics["eval/kl"] == pytest.approx(total / (80 * length), rel=1e-4)

"""Whole runs of PPO: that it learns, what it leaves behind, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.models.finetune import Finetune, LastLayers, Lora
from rlhf_exp.models.loading import load_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.attempts import CheckedReward
from rlhf_exp.rewards.judge import Judge
from rlhf_exp.rewards.keyword import Keyword
from rlhf_exp.rewards.length import Length
from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rewards.weighted_sum import Term, WeightedSum
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.settings import ConfigError, settings
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.tasks.labelled_text import LabelledTextFile
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import WarmupDecay
from rlhf_exp.types import Completions

from ..builders import ARCHITECTURES
from ..rl.toy import RAGGED, Echoed, EchoTask, context, parts, ppo_with, rows, saved_model, start


def final_metrics(path: Path, ppo: PPO, seed: int = 1, **replaced: object) -> dict[str, float]:
    given = parts(**replaced)
    metrics = dict(ppo.run(context(path, seed), given).after)
    assert {*metrics} == {*ppo.metric_names(given)}
    return metrics


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.soak) for n in (2, 3))])
def test_bandit_is_solved(tmp_path: Path, seed: int) -> None:
    ppo = ppo_with(total_phases=15, kl_coef=0.0, eval_every=15, eval_samples=256)
    after = final_metrics(tmp_path, ppo, seed, sampler=CachedSampler(gen_len=1))
    assert after["eval/score"] > 0.9


@pytest.mark.usefixtures("unchecked")
def test_a_longer_answer_is_learned_through_the_value_head(tmp_path: Path) -> None:
    ppo = ppo_with(total_phases=20, kl_coef=0.0, eval_every=20)
    sampler = CachedSampler(gen_len=8, stop_at_eos=True)
    result = ppo.run(
        context(tmp_path), parts(sampler=sampler, reward=Length(target_tokens=2), task=RAGGED)
    )
    assert result.after["eval/score"] > result.before["eval/score"] + 0.5
    assert result.after["eval/len_mean"] < 4 < result.before["eval/len_mean"]


@pytest.mark.usefixtures("unchecked")
def test_a_reward_that_is_always_the_same_moves_nothing_far(tmp_path: Path) -> None:
    ppo = ppo_with(total_phases=8, eval_every=8)
    nothing = Keyword(keywords=["absent"])
    moved = final_metrics(tmp_path / "a", ppo, optimizer=AdamWSettings())
    still = final_metrics(tmp_path / "b", ppo, reward=nothing, optimizer=AdamWSettings())
    assert still["eval/kl"] < 0.01
    assert moved["eval/kl"] > 3 * still["eval/kl"]


@pytest.mark.usefixtures("unchecked")
def test_a_huge_penalty_holds_the_policy(tmp_path: Path) -> None:
    held = ppo_with(total_phases=8, eval_every=8, kl_coef=1000.0)
    free = ppo_with(total_phases=8, eval_every=8, kl_coef=0.0)
    held_kl = final_metrics(tmp_path / "a", held)["eval/kl"]
    assert held_kl < 5e-3
    assert final_metrics(tmp_path / "b", free)["eval/kl"] > 20 * held_kl


@pytest.mark.usefixtures("unchecked")
def test_two_runs_are_equal_and_another_seed_is_not(tmp_path: Path) -> None:
    ppo = ppo_with(total_phases=3, eval_every=2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo.run(context(tmp_path / name, seed), parts(task=RAGGED))
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
    ppo = ppo_with(total_phases=4, eval_every=3, eval_samples=16)
    sampler, schedule = CachedSampler(gen_len=4, top_k=5), WarmupDecay(warmup_steps=2)
    actors_before, _ = start(ppo, tmp_path / "other", sampler=sampler, schedule=schedule)
    ppo.run(context(tmp_path), parts(sampler=sampler, schedule=schedule))
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


@pytest.mark.parametrize(
    ("eval_every", "rests"),
    [
        (1, [("phases 1 x ", "evaluations 1 x "), ("phases 3 x ", "evaluations 3 x ")]),
        (2, [("phases 1 x ", "evaluations 1 x "), ("phases 3 x ", "evaluations 2 x ")]),
    ],
)
def test_a_run_says_how_long_the_rest_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, eval_every: int, rests: list[tuple[str, str]]
) -> None:
    caplog.set_level("INFO")
    for total_phases in (2, 5):
        ppo = ppo_with(total_phases=total_phases, eval_every=eval_every)
        ppo.run(context(tmp_path, resume=total_phases == 5), parts())
    lines = [line for line in caplog.messages if " s to go: " in line]
    for line, rest in zip(lines, rests, strict=True):
        assert [part in line for part in rest] == [True, True]


@settings
class Noting:
    """Writes down the prompts of each call, a line a call."""

    file: str

    def load(self, device: torch.device) -> RewardFunction:
        def score(completions: Completions) -> torch.Tensor:
            with Path(self.file).open("a") as file:
                file.write(json.dumps(completions.prompts.texts) + "\n")
            return torch.zeros(len(completions.texts))

        return score


def test_no_prompt_of_the_evaluation_is_trained_on(tmp_path: Path) -> None:
    ppo = ppo_with(total_phases=3, batch_size=32, eval_every=2, eval_samples=24)
    reward = Noting(file=str(tmp_path / "prompts"))
    sampler = CachedSampler(gen_len=2, stop_at_eos=True)
    ppo.run(context(tmp_path / "run"), parts(task=EchoTask(), reward=reward, sampler=sampler))
    calls = [json.loads(line) for line in (tmp_path / "prompts").read_text().splitlines()]
    # An evaluation, two phases, an evaluation, a phase, an evaluation.
    assert len(calls) == 6
    trained = sorted(text for i in (1, 2, 4) for text in calls[i])
    assert trained == sorted(EchoTask().train_prompts())  # each of the 96 once
    for i in (0, 3, 5):
        assert sorted(calls[i]) == sorted(EchoTask().eval_prompts())


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
    ppo = ppo_with(total_phases=3, eval_samples=4, eval_every=3)
    with pytest.raises(RewardError, match=rf"{where}samples, the first: 'w0 w1") as error:
        ppo.run(context(tmp_path), parts(reward=Broken(value=value, good=good)))
    assert f"the reward gave {value} for 1 of" in str(error.value)


def test_a_reward_must_give_one_score_each(tmp_path: Path) -> None:
    setup, _ = start(PPO(), tmp_path)
    generation = setup.sampler(setup.policy, setup.train_prompts, torch.Generator())
    with pytest.raises(RewardError, match=r"phase 3: .* shape \(2,\) for 1 samples"):
        CheckedReward(lambda _: torch.zeros(2))(generation.completions, phase=3)


def test_batch_size_must_be_a_multiple_of_num_minibatches() -> None:
    with pytest.raises(
        ValidationError, match="batch_size=30 must be a multiple of num_minibatches=4"
    ):
        ppo_with(batch_size=30)


def test_prompt_and_completion_must_fit_the_context(tmp_path: Path) -> None:
    message = "prompt of 3 tokens and sampler.gen_len=14 .* context of 16 tokens.* at most 13"
    with pytest.raises(ConfigError, match=message):
        PPO().run(context(tmp_path), parts(sampler=CachedSampler(gen_len=14)))
    assert not list(tmp_path.iterdir())


def check(ppo: PPO, **replaced: object) -> list[str]:
    return ppo.check(parts(**{"schedule": WarmupDecay(warmup_steps=5), **replaced}))


def test_schedule_must_fit_the_phases() -> None:
    assert check(ppo_with(total_phases=5)) == [
        "schedule.warmup_steps=5 must be below stage.total_phases=5: lower the first or raise the"
        " second"
    ]
    assert not check(ppo_with(total_phases=6))


def test_a_task_that_knows_answers_is_measured_by_them(tmp_path: Path) -> None:
    ppo = ppo_with(total_phases=2, eval_every=1, eval_samples=30)
    sampler = CachedSampler(gen_len=3, stop_at_eos=True)
    given = context(tmp_path)
    result = ppo.run(given, parts(task=EchoTask(), reward=Echoed(), sampler=sampler))
    given.presentation.show()
    evaluations = [row for row in rows(tmp_path) if "eval/score" in row]
    assert [row["phase"] for row in evaluations] == [0, 1, 2]
    for row in evaluations:
        assert row["eval/true_reward"] == pytest.approx(row["eval/score"])
        assert {"eval/reward_gap", "eval/exact_match", "eval/greedy_exact_match"} < set(row)
    assert result.before == {k: v for k, v in evaluations[0].items() if k != "phase"}
    assert result.after == {k: v for k, v in evaluations[-1].items() if k != "phase"}
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert {"true_reward", "exact"} < set(rows(tmp_path, "samples.jsonl")[0])


def test_a_task_whose_file_is_missing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        check(PPO(), task=LabelledTextFile(path="nowhere.jsonl"))


def test_parts_that_do_not_fit_each_other_are_refused() -> None:
    endless, ending = CachedSampler(), CachedSampler(stop_at_eos=True)
    penalty = ppo_with(missing_eos_penalty=1.0)
    assert check(penalty, sampler=endless) == [
        "stage.missing_eos_penalty needs sampler.stop_at_eos=true"
    ]
    assert check(ppo_with(missing_eos_penalty=0.0), sampler=endless) != []
    assert check(penalty, sampler=ending) == check(PPO(), sampler=endless) == []
    hooked = Scratch(engine="hooked")
    assert check(ppo_with(gradient_checkpointing=True), model=hooked) == [
        "stage.compute.gradient_checkpointing needs model.engine=fast"
    ]
    for name, value in (("dtype", "bf16"), ("compile", "on")):
        assert check(ppo_with(**{name: value}), model=hooked) == [
            f"stage.compute.{name}={value} needs model.engine=fast"
        ]
    assert check(ppo_with(dtype="bf16", compile="on")) == []
    assert check(ppo_with(dtype="fp32", compile="off", async_reward=True), model=hooked) == []
    judge = Judge(template="{text}", answers=["a", "b"])
    assert check(PPO(), reward=judge) == []
    for reward in (judge, WeightedSum(terms={"a": Term(weight=1, reward=judge)})):
        [problem] = check(ppo_with(async_reward=True), reward=reward)
        assert "async_reward=true: with reward.name=policy the reference scores" in problem
    both = ppo_with(compile="on", gradient_checkpointing=True)
    assert check(both) == [
        "stage.compute.compile=on and stage.compute.gradient_checkpointing exclude each other"
    ]
    assert len(check(both, model=hooked)) == 3
    assert check(PPO(), model=hooked) == check(ppo_with(gradient_checkpointing=True)) == []
    assert check(PPO(), task=EchoTask(), sampler=endless) == [
        "the task has exact answers, which end: set sampler.stop_at_eos=true"
    ]
    assert check(PPO(), task=EchoTask(), sampler=ending) == []
    [problem] = check(PPO(), model=hooked, finetune=Lora())
    assert "finetune=lora needs model.engine=fast" in problem


def test_everything_that_is_wrong_is_said_at_once() -> None:
    wrong = ppo_with(total_phases=5, missing_eos_penalty=1.0, gradient_checkpointing=True)
    problems = check(wrong, model=Scratch(engine="hooked"), finetune=Lora(), task=EchoTask())
    assert len(problems) == 5


@pytest.mark.parametrize(
    "kind", [LastLayers(num_layers_unfrozen=9), Lora(target_modules=["nothing"])]
)
def test_what_a_reference_cannot_do_is_said_before_anything_is_written(
    kind: Finetune, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"finetune\.(num_layers_unfrozen|target_modules)="):
        PPO().run(context(tmp_path), parts(finetune=kind))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("pad", ["eos", "none"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tokenizer_whose_padding_is_eos_or_that_has_none(
    architecture: str, pad: str, tmp_path: Path
) -> None:
    model = saved_model(tmp_path / "model", architecture=architecture)
    ppo = ppo_with(total_phases=1, batch_size=32, eval_every=1, eval_samples=64)
    sampler = CachedSampler(gen_len=4, stop_at_eos=True, temperature=5.0)
    given = parts(task=RAGGED, model=model, sampler=sampler, reward=Length(target_tokens=2))
    expected = ppo.run(context(tmp_path / "run"), given)

    for name in ("tokenizer_config.json", "config.json"):
        file = tmp_path / "model" / name
        content = json.loads(file.read_text())
        key = "pad_token" if name == "tokenizer_config.json" else "pad_token_id"
        content[key] = None if pad == "none" else content[key.replace("pad", "eos")]
        file.write_text(json.dumps(content))
    tokenizer = load_policy(tmp_path / "model").tokenizer
    assert tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == (2 if pad == "eos" else None)
    result = ppo.run(context(tmp_path / pad), given)
    # Padding is known by its mask alone, and an EOS that was sampled is none.
    assert result.before == expected.before
    (one, other) = (rows(tmp_path / name)[1] for name in ("run", pad))
    for name in ("objective/scores", "objective/kl_sum", "sample/len_mean"):
        assert one[name] == other[name]
    assert 2 < one["sample/len_mean"] < 4
    # Of Llama and Qwen2 the input embedding of the padding id is not trained.
    assert result.after == pytest.approx(expected.after, rel=0.1)

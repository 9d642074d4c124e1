"""Best of n: every number is that of all sets of n of the samples that the reward saw."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.functional.best_of_n import best_of_n_kl
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.saving import save_policy
from rlhf_exp.report.payload import Names, build_payload
from rlhf_exp.rewards.keyword import Keyword
from rlhf_exp.rewards.length import Length
from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rewards.weighted_sum import Term, WeightedSum
from rlhf_exp.rl.limit import read_limit
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.settings import ConfigError, settings
from rlhf_exp.stages.best_of_n import BestOfN
from rlhf_exp.stages.protocol import StageResult
from rlhf_exp.tasks.labelled_text import LabelledTextFile
from rlhf_exp.tasks.protocol import PromptRow
from rlhf_exp.types import Completions

from ..app.test_run import train
from ..rl.toy import (
    RAGGED,
    Echoed,
    EchoTask,
    ToyTask,
    context,
    echo_policy,
    parts,
    parts_of,
    ppo_with,
    rows,
)

SAMPLER = CachedSampler(gen_len=3, stop_at_eos=True)
STAGE = BestOfN(samples_per_prompt=6, num_prompts=5, batch_size=8)


@dataclass(frozen=True)
class Scored:
    """A completion and its scores: the reward's, and the task's own."""

    prompt: str
    text: str
    score: float
    true: float
    exact: bool
    length: int


@settings
class Recorded:
    """Prefers long answers to echoed ones, and keeps what it scored."""

    def load(self, device: torch.device) -> RewardFunction:
        task = EchoTask()

        def score(completions: Completions) -> torch.Tensor:
            scores = []
            for prompt, text, tokens, length in zip(
                completions.prompts.texts,
                completions.texts,
                completions.tokens.tolist(),
                completions.mask.sum(dim=1).tolist(),
                strict=True,
            ):
                true = task.true_reward(prompt, text)
                ended = tokens[length - 1] == 2 and length == 1 + len(text.split())
                exact = ended and text == task.answer(prompt)
                scored = Scored(prompt, text, round(length + 2 * true) / 2, true, exact, length)
                scores.append(scored.score)
                SEEN.append(scored)
            return torch.tensor(scores, device=device)

        return score


SEEN: list[Scored] = []


@pytest.fixture(autouse=True)
def seen() -> list[Scored]:
    """What `Recorded` scored in this test."""
    SEEN.clear()
    return SEEN


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    path = tmp_path_factory.mktemp("echo")
    save_policy(echo_policy(), path)
    return Pretrained(base_model=str(path))


def make(
    path: Path, model: Pretrained, stage: BestOfN = STAGE, *, seed: int = 1, **replaced: Any
) -> StageResult:
    defaults = {"task": EchoTask(), "reward": Recorded(), "sampler": SAMPLER}
    given = context(path, seed)
    result = stage.run(given, parts_of(stage, model=model, **{**defaults, **replaced}))
    given.presentation.show()
    return result


def best(samples: Sequence[Scored]) -> list[Scored]:
    """All that have the highest score."""
    return [s for s in samples if s.score == max(other.score for other in samples)]


def expected(samples: Sequence[Scored], n: int) -> dict[str, float]:
    """The numbers of one prompt, from all sets of n of its samples and, for the KL, from the shares
    of their scores."""
    sets = [*itertools.combinations(samples, n)]

    def mean(name: str) -> float:
        of_sets = [[getattr(s, name) for s in best(drawn)] for drawn in sets]
        return math.fsum(sum(values) / len(values) for values in of_sets) / len(sets)

    scores, kl = [s.score for s in samples], 0.0
    for score in set(scores):
        up, below = (
            sum(other <= score for other in scores),
            sum(other < score for other in scores),
        )
        q = (up / len(scores)) ** n - (below / len(scores)) ** n
        kl += q * math.log(q * len(scores) / (up - below))
    return {
        "eval/score": mean("score"), "eval/true_reward": mean("true"),
        "eval/exact_match": mean("exact"), "eval/len_mean": mean("length"), "eval/kl_sum": kl,
    }  # fmt: skip


def test_each_row_is_of_all_sets_of_n_of_the_samples(
    tmp_path: Path, model: Pretrained, seen: list[Scored]
) -> None:
    result = make(tmp_path, model)
    by_prompt = [seen[6 * i : 6 * i + 6] for i in range(5)]
    assert len(seen) == 30
    assert [len({s.prompt for s in samples}) for samples in by_prompt] == [1] * 5
    assert len({s.prompt for s in seen}) == 5
    assert {s.prompt for s in seen} <= set(EchoTask().eval_prompts())
    logged = rows(tmp_path)
    assert [row["phase"] for row in logged] == [1, 2, 4, 6]
    for row in logged:
        n = row["phase"]
        of_prompts = [expected(samples, n) for samples in by_prompt]
        wanted = {name: sum(e[name] for e in of_prompts) / 5 for name in of_prompts[0]}
        wanted["eval/kl"] = wanted["eval/kl_sum"] / wanted["eval/len_mean"]
        wanted["eval/kl_sum_bound"] = math.log(n) - 1 + 1 / n
        wanted["eval/reward_gap"] = wanted["eval/score"] - wanted["eval/true_reward"]
        assert {*row} == {"phase", *wanted}
        for name, value in wanted.items():
            # True rewards are kept in float32.
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-9), (n, name)
    limit = read_limit(tmp_path)
    assert limit is not None
    assert limit.scores.tolist() == [[s.score for s in samples] for samples in by_prompt]
    assert limit.true_rewards is not None
    assert limit.true_rewards.mean().item() == pytest.approx(logged[0]["eval/true_reward"])
    scores = [row["eval/score"] for row in logged]
    assert scores[0] == pytest.approx(sum(s.score for s in seen) / 30)
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.1
    assert logged[0]["eval/kl_sum"] == pytest.approx(0, abs=1e-12)
    assert logged[1]["eval/kl_sum"] > 0.01
    assert {*result.after} == {*STAGE.metric_names(parts_of(STAGE, task=EchoTask()))}
    assert result.before == {k: v for k, v in logged[0].items() if k != "phase"}
    assert result.after == {k: v for k, v in logged[-1].items() if k != "phase"}


def test_the_chosen_samples_are_the_first_and_the_best_of_each_prompt(
    tmp_path: Path, model: Pretrained, seen: list[Scored], capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, model)
    chosen = rows(tmp_path, "samples.jsonl")
    assert [row["phase"] for row in chosen] == [1] * 5 + [6] * 5
    by_prompt = [seen[6 * i : 6 * i + 6] for i in range(5)]
    for samples, first, last in zip(by_prompt, chosen[:5], chosen[5:], strict=True):
        for row, sample in ((first, samples[0]), (last, best(samples)[0])):
            assert row["true_reward"] == pytest.approx(sample.true)
            wanted = {"prompt": sample.prompt, "completion": sample.text, "score": sample.score}
            assert row.items() >= {**wanted, "exact": sample.exact}.items()
            assert {*row} == {"phase", *wanted, "exact", "true_reward"}
    assert "before and after" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "model").exists()


@settings
class Numbered:
    """A number for each completion; `rounding` adds to it what changes from sample to sample."""

    rounding: float = 0.0

    def load(self, device: torch.device) -> RewardFunction:
        def score(completions: Completions) -> torch.Tensor:
            weights = torch.tensor([1.0, 20.0, 400.0])
            return completions.tokens.float() @ weights + self.rounding * torch.rand(
                len(completions.texts)
            )

        return score


def test_rounding_that_changes_from_batch_to_batch_breaks_no_ties(
    tmp_path: Path, model: Pretrained
) -> None:
    stage = BestOfN(samples_per_prompt=24, num_prompts=3, batch_size=8)
    for name, rounding in (("exact", 0.0), ("rounded", 1e-2)):
        make(tmp_path / name, model, stage, reward=Numbered(rounding=rounding))
    for exact, rounded in zip(rows(tmp_path / "exact"), rows(tmp_path / "rounded"), strict=True):
        assert rounded["eval/score"] == pytest.approx(exact["eval/score"], abs=1e-2)
        assert rounded["eval/kl_sum"] == pytest.approx(exact["eval/kl_sum"], abs=1e-12)
    distinct = best_of_n_kl(torch.arange(24.0)[None], 24).item()
    assert exact["eval/kl_sum"] < distinct - 0.01, "no completion was sampled twice"


def test_prompts_and_scores_are_those_of_ppos_first_evaluation(
    tmp_path: Path, model: Pretrained
) -> None:
    stage = BestOfN(samples_per_prompt=32, num_prompts=20)
    make(tmp_path / "best", model, stage, reward=Echoed())
    ppo = ppo_with(total_phases=1, batch_size=4, eval_samples=640)
    taken = parts(task=EchoTask(), model=model, reward=Echoed(), sampler=SAMPLER)
    ppo.run(context(tmp_path / "ppo"), taken)
    prompts = [row["prompt"] for row in rows(tmp_path / "best", "samples.jsonl")[:20]]
    assert prompts == [row["prompt"] for row in rows(tmp_path / "ppo", "samples.jsonl")[:20]]
    ours, theirs = rows(tmp_path / "best")[0], rows(tmp_path / "ppo")[0]
    for name in ("eval/score", "eval/exact_match", "eval/true_reward"):
        # Of 640 numbers in [0, 1] the mean is off by at most 0.02, one standard error.
        assert ours[name] == pytest.approx(theirs[name], abs=0.08), name
    assert ours["eval/len_mean"] == pytest.approx(theirs["eval/len_mean"], abs=0.12)


def test_without_a_number_all_prompts_are_taken_or_64(tmp_path: Path, model: Pretrained) -> None:
    stage, many = (
        BestOfN(samples_per_prompt=2),
        ToyTask(prompts=tuple(f"w{i % 12}" for i in range(70))),
    )
    for name, task, count in (("few", RAGGED, 4), ("many", many, 64)):
        make(tmp_path / name, model, stage, task=task, reward=Length(target_tokens=2))
        chosen = rows(tmp_path / name, "samples.jsonl")
        assert len(chosen) == 2 * count
        assert {*rows(tmp_path / name)[0]} == {"phase", *stage.metric_names(parts_of(stage))}


@pytest.mark.parametrize("task", [EchoTask(), ToyTask()], ids=["many prompts", "one prompt"])
def test_the_samples_are_those_of_the_seed(
    task: ToyTask, tmp_path: Path, model: Pretrained
) -> None:
    stage = BestOfN(samples_per_prompt=6, num_prompts=5 if isinstance(task, EchoTask) else 1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(tmp_path / name, model, stage, seed=seed, task=task, reward=Length(target_tokens=2))
        torch.rand(3)
    a, b, c = (rows(tmp_path / name) + rows(tmp_path / name, "samples.jsonl") for name in "abc")
    assert a == b != c


def test_the_terms_of_a_sum_are_those_of_the_completion_that_the_sum_prefers(
    tmp_path: Path, model: Pretrained
) -> None:
    total = WeightedSum(
        terms={
            "true": Term(weight=1.0, reward=Echoed()),
            "w1": Term(weight=-0.5, reward=Keyword(keywords=["w1"])),
        }
    )
    result = make(tmp_path, model, reward=total)
    assert {*result.after} == {*STAGE.metric_names(parts_of(STAGE, task=EchoTask(), reward=total))}
    for row in rows(tmp_path):
        assert row["eval/score_true"] == pytest.approx(row["eval/true_reward"])
        sum_ = row["eval/score_true"] - 0.5 * row["eval/score_w1"]
        assert row["eval/score"] == pytest.approx(sum_)
    assert {"score_true", "score_w1"} < rows(tmp_path, "samples.jsonl")[0].keys()


def test_half_precision_samples_too(tmp_path: Path, model: Pretrained) -> None:
    result = make(tmp_path, model, BestOfN(**{**vars(STAGE), "dtype": "bf16"}))
    assert result.after["eval/score"] > result.before["eval/score"]


@pytest.mark.parametrize(
    ("most", "counts"), [(2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_n_is_each_power_of_two_and_the_largest(most: int, counts: list[int]) -> None:
    assert BestOfN(samples_per_prompt=most).counts == counts


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        BestOfN(samples_per_prompt=1)


@pytest.mark.parametrize(
    ("key", "value", "fix"), [("temperature", 0.7, "1"), ("top_k", 5, "null"), ("top_p", 0.9, "1")]
)
def test_a_sampler_of_another_distribution_is_refused(key: str, value: Any, fix: str) -> None:
    assert STAGE.check(parts_of(STAGE)) == []
    assert STAGE.check(parts_of(STAGE, sampler=CachedSampler(**{key: value}))) == [
        f"sampler.{key}={value}: stage=best_of_n samples from the full distribution at"
        f" temperature 1, as evaluations do: set sampler.{key}={fix}"
    ]


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    assert STAGE.check(parts_of(STAGE, task=EchoTask())) == [
        "the task has exact answers, which end: set sampler.stop_at_eos=true"
    ]
    with pytest.raises(ConfigError, match="nowhere"):
        STAGE.check(parts_of(STAGE, task=LabelledTextFile(path="nowhere.jsonl")))
    with pytest.raises(ConfigError, match="nowhere"):
        STAGE.check(parts_of(STAGE, model=Pretrained(base_model=str(tmp_path / "nowhere"))))


@dataclass(frozen=True)
class FirstWords(ToyTask):
    """Prompts cut to BOS and their first word; that of one is trained on too."""

    def eval_prompts(self) -> tuple[str, ...]:
        return ("w2 w3", "w0 w5", "w4")

    def shape_prompt(self, row: PromptRow, ids: Sequence[int]) -> Sequence[int] | None:
        return ids[:2]


def test_more_prompts_than_the_task_has_are_refused(tmp_path: Path, model: Pretrained) -> None:
    message = "stage.num_prompts={} is above the number of the task's evaluation prompts, {}: set"
    absent = Pretrained(base_model=str(tmp_path / "absent"))  # it is not loaded
    with pytest.raises(ConfigError, match=message.format(5, 4)):
        make(tmp_path / "run", absent, task=RAGGED, reward=Length(target_tokens=2))
    assert STAGE.check_texts(parts_of(STAGE, task=EchoTask())) == []
    three = BestOfN(**{**vars(STAGE), "num_prompts": 3})
    with pytest.raises(ConfigError, match=message.format(3, 2)):
        make(tmp_path / "run", model, three, task=FirstWords(), reward=Length(target_tokens=2))
    assert not (tmp_path / "run").exists()


@settings
class Broken:
    """A reward that is not finite."""

    def load(self, device: torch.device) -> RewardFunction:
        return lambda completions: torch.full((len(completions.texts),), torch.nan)


def test_a_reward_that_is_not_finite_stops_the_run(tmp_path: Path, model: Pretrained) -> None:
    with pytest.raises(RewardError, match="phase 1: the reward gave nan for 8 of 8 samples"):
        make(tmp_path, model, reward=Broken())


def test_a_run_by_command_is_a_line_of_the_report(tmp_path: Path) -> None:
    outcome = train(
        tmp_path, "~experiment", "stage=best_of_n", "stage.samples_per_prompt=6", "task=reviews",
        "reward=length", "reward.target_tokens=9", "model.num_layers=1", "model.d_model=16",
        "sampler.gen_len=6", "sampler.stop_at_eos=true", "logger=local", "hydra.run.dir=run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "best of 6: score " in outcome.out
    payload = build_payload([tmp_path / "run"], Names(), made=datetime(2026, 11, 30))
    [group], [run] = payload["groups"], payload["runs"]
    assert (group["path_axis"], run["status"], payload["problems"]) == ("n", "done", [])
    logged = rows(tmp_path / "run")
    for name in ("score", "kl"):
        values = [row[f"eval/{name}"] for row in logged]
        assert [point[name] for point in group["path"]] == pytest.approx(values, rel=1e-3)
    assert [point["phase"] for point in group["path"]] == [1, 2, 4, 6]
    assert run["samples"][0]["score_after"] >= run["samples"][0]["score_before"]
